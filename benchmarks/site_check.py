"""Opens pages of the built site in a browser: screenshots, sideways scrolling, accessibility.

mkdocs build --strict --site-dir build/site
python -m benchmarks.site_check build/site --shots docs/pictures
npm install --prefix build axe-core
python -m benchmarks.site_check build/site --axe build/node_modules/axe-core/axe.min.js

Exits with 1 when a page scrolls sideways as a whole, or axe-core finds something serious.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

#: Those that pictures are kept of.
SHOWN = ("index", "tutorial", "reference", "performance")
PAGES = (*SHOWN, "errors", "how-to/whole-job")
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
SERIOUS = ("serious", "critical")


def main(arguments: list[str] | None = None) -> int:
    """Open the pages, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("site", type=Path, help="what mkdocs built")
    parser.add_argument("--shots", type=Path, help="folder for pictures of some")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core, from the npm registry")
    parser.add_argument("--page", action="append", type=Path, help="another HTML file, a report")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    files = [options.site / f"{page}.html" for page in PAGES] + (options.page or [])
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for file in files:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    found += _look(browser, file, width, scheme, options)
        browser.close()
    print("\n".join(found) or f"{len(files)} pages, {len(WIDTHS) * len(SCHEMES)} views each: good")
    return int(bool(found))


def _look(browser: Any, file: Path, width: int, scheme: str, options: Any) -> list[str]:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    # Only files: what a page would fetch from elsewhere is not needed to read it.
    context.route("http*://**", lambda route: route.abort())
    tab = context.new_page()
    tab.goto(file.resolve().as_uri())
    tab.wait_for_timeout(300)
    where = f"{file.stem}, {width} px, {scheme}"
    found = []
    if tab.evaluate("document.documentElement.scrollWidth") > width:
        found.append(f"{where}: the page scrolls sideways")
    if options.axe is not None:
        tab.add_script_tag(path=str(options.axe))
        for one in tab.evaluate("axe.run().then((results) => results.violations)"):
            if one["impact"] in SERIOUS:
                nodes = ", ".join(node["target"][0] for node in one["nodes"][:3])
                found.append(f"{where}: {one['id']}: {one['help']} ({nodes})")
    if options.shots is not None and file.stem in SHOWN:
        from PIL import Image

        options.shots.mkdir(parents=True, exist_ok=True)
        # A few colours are enough to see what is where, and the files are small.
        with Image.open(io.BytesIO(tab.screenshot())) as image:
            path = options.shots / f"site-{file.stem}-{width}-{scheme}.png"
            few = image.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
            few.save(path, optimize=True)
    context.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
