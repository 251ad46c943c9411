"""Networks of transformers and timm: prepared as they say, and written so that they load again."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import fxfuse
from fxfuse.api.own_config import config_problem
from fxfuse.cli.app import app
from fxfuse.cli.own_preparation import own_tokens, own_transform
from fxfuse.cli.recipe import as_recipe, read_recipe
from fxfuse.cli.recipe.networks import load_data, load_networks
from fxfuse.cli.recipe.schema import DataSource
from fxfuse.cli.sources import read_data
from fxfuse.cli.zoo import make_model
from fxfuse.errors import InputError, OptionError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "under", "tree"]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)


def llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, **sizes, **heads)).eval()


def bert(seed: int):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    config = BertConfig(vocab_size=13, num_attention_heads=4, num_labels=3, **sizes)
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        llama(seed).save_pretrained(name)
        save_tokenizer(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + n % 8,), generator=generator))
        for n in range(120)
    ]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_language_model_from_texts_to_a_folder_of_its_library(work: Path) -> None:
    """Calibrated on texts, half as large, written with its tokenizer, and read by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = ("fuse", "a", "b", "--model", "hf:a", "--input", "ids:6", "--width", "0.5")
    more = ("--text", "texts.txt", "--refine", "refit", "--out", "fused")
    result = invoke(*asked, *more)
    assert result.exit_code == 0, result.output
    assert "for transformers, with a model card: fused/pretrained" in result.stdout
    config = json.loads((work / "fused/pretrained/config.json").read_text())
    wanted = {"hidden_size": 8, "intermediate_size": 12, "use_cache": True, "head_dim": 4}
    wanted |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert {name: config[name] for name in wanted} == wanted
    assert AutoTokenizer.from_pretrained("fused/pretrained")("the dog")["input_ids"] == [3, 6]
    loaded = AutoModelForCausalLM.from_pretrained("fused/pretrained")
    ids = torch.randint(13, (3, 6))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, fxfuse.load("fused")(ids)[0])
    card = (work / "fused/pretrained/README.md").read_text()
    hashes = read_recipe("fused").made.sha256
    own = [hashes[f"{name}/model.safetensors"] for name in "ab"]
    for part in (*own, "Method: transplant", "library_name: transformers", "ids:6"):
        assert part in card
    assert str(work) not in card
    # It is replaced as a whole, unless somebody put something into it.
    (work / "fused/pretrained/notes.txt").write_text("mine")
    assert invoke(*asked, *more, "--force").exit_code == 2
    (work / "fused/pretrained/notes.txt").unlink()
    assert invoke(*asked, "--force", "--out", "fused").exit_code == 0


def test_a_configuration_says_the_number_of_heads_or_that_it_cannot() -> None:
    """In Python, too: `to_module` has a configuration that gives it."""
    example = {"input_ids": torch.randint(13, (2, 6))}
    whole = fxfuse.fuse([bert(0), bert(1)], example, size=0.5, verify=False).to_module()
    # Two heads of four numbers: their shapes could be four heads of two, too.
    assert (whole.config.hidden_size, whole.config.num_attention_heads) == (8, 2)
    assert config_problem(whole) == ""
    part = fxfuse.fuse([bert(0), bert(1)], example, size={"*attention*": 0.5}, verify=False)
    assert "query.weight is [8, 16], its configuration gives [16, 16]" in config_problem(
        part.to_module()
    )


def test_what_a_configuration_cannot_say_is_said(work: Path) -> None:
    for seed, name in enumerate("cd"):
        bert(seed).save_pretrained(name)
    asked = (
        "fuse",
        "c",
        "d",
        "--model",
        "hf:c",
        "--input",
        "ids:6:13",
        "--width",
        "*attention*=0.5",
    )
    result = invoke(*asked, "--out", "fused", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "no folder for transformers beside it: bert.encoder.layer.0" in result.stdout
    assert not (work / "fused/pretrained").exists()


def test_members_of_the_hub(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by their ids in its cache; those that only a folder names are not asked for."""
    from huggingface_hub import constants

    for name in "ab":
        place = work / f"cache/models--user--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("0123abcd")
        shutil.copytree(work / name, place / "snapshots/0123abcd")
        shutil.rmtree(work / name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(work / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = ("fuse", "hf:user/a", "hf:user/b@main", "--model", "hf:user/a", "--input", "ids:6:13")
    result = invoke(*asked, "--no-verify", "--out", "fused")
    assert result.exit_code == 0, result.output
    card = (work / "fused/pretrained/README.md").read_text()
    assert re.search(r"\| hf:user/b@main \| [0-9a-f]{64} ", card)
    assert str(work) not in card
    refused = invoke("run", "fused", "--out", "again")
    assert refused.exit_code == 2
    assert "'hf:user/a' is not downloaded only because a folder names it" in refused.stderr
    assert invoke("run", "fused", "--out", "again", "--trust").exit_code == 0
    missing = invoke("fuse", "hf:user/c", *asked[2:], "--out", "other")
    assert missing.exit_code == 2
    assert "user/c cannot be read from the Hugging Face hub" in missing.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a commit of small files needs."""

    got: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}"
        if self.path.endswith("/repos/create"):
            answer: object = {"url": f"{here}/user/fused", "id": "user/fused"}
        elif self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            answer = {"files": [{**f, "shouldIgnore": False} for f in files]}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.got[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{here}/user/fused/commit/0", "commitOid": "0"}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.nightly
def test_a_fused_network_is_pushed_with_its_configuration(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a hub on this machine."""
    from huggingface_hub import constants
    from transformers import LlamaForCausalLM

    example = {"input_ids": torch.randint(13, (2, 6)), "use_cache": False}
    whole = fxfuse.fuse([llama(0), llama(1)], example, size=0.5, verify=False).to_module()
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        whole.push_to_hub("user/fused", token="hf_none")
    finally:
        server.shutdown()
        server.server_close()
    assert json.loads(Hub.got["config.json"])["num_key_value_heads"] == 1
    for name, content in Hub.got.items():
        (work / "pushed").mkdir(exist_ok=True)
        (work / "pushed" / name).write_bytes(content)
    again = LlamaForCausalLM.from_pretrained("pushed")
    with torch.no_grad():
        torch.testing.assert_close(again(**example).logits, whole(**example).logits)


def test_texts_become_what_the_network_takes(work: Path) -> None:
    rows = own_tokens("hf:a", 4, masked=True)(["the dog", "a cat sat on the mat"])
    assert [x.tolist() for x in rows] == [[[3, 6, 0, 0], [4, 5, 7, 9]], [[1, 1, 0, 0], [1] * 4]]
    (blocks,) = own_tokens("hf:a", 4, masked=False)(["the dog", "a cat sat on the mat"])
    assert blocks.tolist() == [[3, 6, 2, 4], [5, 7, 9, 3]]
    with pytest.raises(OptionError, match="texts need a tokenizer"):
        own_tokens("torchvision:resnet18", 4, masked=False)
    (work / "a/tokenizer.json").write_text("{}")
    with pytest.raises(OptionError, match="holds no usable tokenizer"):
        own_tokens("hf:a", 4, masked=False)
    asked = ("fuse", "a", "b", "--model", "hf:a", "--input", "ids:6:13", "--out", "fused")
    for wrong, said in (
        (("--text", "words.csv"), "its name does not end in .txt"),
        (("--text", "texts.txt", "--calibration", "texts.txt"), "contradict each other"),
    ):
        result = invoke(*asked, *wrong)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())


def test_a_text_classifier_gets_a_mask(work: Path) -> None:
    for seed, name in enumerate("cd"):
        bert(seed).save_pretrained(name)
        save_tokenizer(work / name)
    asked = ("fuse", "c", "d", "--model", "hf:c", "--input", "ids:6:13", "--no-verify")
    result = invoke(*asked, "--text", "texts.txt", "--refine", "refit", "--out", "fused")
    assert result.exit_code == 0, result.output
    ids, mask = torch.randint(13, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    fused = fxfuse.load("fused")
    changed = torch.where(mask.bool(), ids, 0)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids, mask).logits, fused(changed, mask).logits)


@pytest.fixture
def picture():
    from PIL import Image

    pixels = torch.arange(3 * 20 * 20, dtype=torch.float32).reshape(20, 20, 3) % 256
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def test_images_are_prepared_as_the_library_says(tmp_path: Path, picture) -> None:
    from transformers import ViTConfig, ViTImageProcessor

    ViTConfig().save_pretrained(tmp_path)
    assert own_transform(f"hf:{tmp_path}", None) is None
    ViTImageProcessor(size={"height": 8, "width": 6}, image_mean=[0.5] * 3).save_pretrained(
        tmp_path
    )
    assert own_transform(f"hf:{tmp_path}", None)(picture).shape == (3, 8, 6)
    pixels = own_transform("timm:convnext_atto", (16, 16))(picture)
    assert pixels.shape == (3, 16, 16)
    # ImageNet's mean is taken off.
    assert pixels.min() < -1
    assert own_transform("torchvision:resnet18", None) is None


def test_a_folder_of_images_is_prepared_as_timm_says(
    work: Path, picture, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless a flag says otherwise."""
    (work / "images").mkdir()
    for number in range(4):
        picture.save(work / "images" / f"{number}.png")
    torch.save(make_model("timm:test_resnet", {}).state_dict(), "x.pt")
    asked = {"model": "timm:test_resnet", "members": ["x.pt"], "input": [3, 20, 20]}
    recipe = as_recipe({**asked, "output": {"folder": "out"}})
    networks = load_networks(recipe, in_memory=True)
    lowest = []
    for preset in (None, "none"):
        caplog.clear()
        with caplog.at_level("INFO", "fxfuse"):
            data = load_data(DataSource(source="images", preset=preset), recipe, networks)
        assert ("prepared as timm does for test_resnet" in caplog.text) is (preset is None)
        lowest.append(float(data.inputs[0].min()))
    assert lowest[0] < 0 <= lowest[1]


def test_texts_are_for_networks_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a cat")
    with pytest.raises(InputError, match="texts need a tokenizer"):
        read_data(str(tmp_path / "t.txt"))


def test_results_of_timm_load_as_its_checkpoints(work: Path) -> None:
    import timm

    for seed, name in enumerate(("x.pt", "y.pt")):
        torch.manual_seed(seed)
        torch.save(make_model("timm:test_resnet", {"num_classes": 3}).state_dict(), name)
    asked = ("fuse", "x.pt", "y.pt", "--model", "timm:test_resnet", "--model-arg", "num_classes=3")
    result = invoke(*asked, "--input", "3,20,20", "--no-verify", "--out", "fused")
    assert result.exit_code == 0, result.output
    made = timm.create_model(
        "test_resnet", num_classes=3, checkpoint_path="fused/fused.safetensors"
    ).eval()
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(made(x), fxfuse.load("fused")(x))
