"""Data for calibration and evaluation, from where users keep it: files, folders, data sets."""

from fxfuse.cli.sources.data import Data, Images, Preparation
from fxfuse.cli.sources.read import absolute, is_function, is_text, read_data

__all__ = ["Data", "Images", "Preparation", "absolute", "is_function", "is_text", "read_data"]
