"""Writes the JSON files; see the package."""

from dashboards.boards import DIRECTORY, texts

for name, text in texts().items():
    (DIRECTORY / name).write_text(text)
