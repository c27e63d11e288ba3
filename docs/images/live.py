"""Draws the live view of a run as an SVG: `python docs/images/live.py RUN_URL FILE URL`, where URL is what it shows as the run's."""

import io
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from elastic_pt.cli.live_screen import Size, screen
from elastic_pt.cli.options import absolute_url
from elastic_pt.report.live import LiveReader
from elastic_pt.report.status import open_run

COLUMNS, ROWS = 112, 34

reader = LiveReader(open_run(absolute_url(sys.argv[1], "RUN_URL")))
for _ in range(10):
    facts = reader.look()
    time.sleep(1.0)
facts = replace(facts, status=replace(facts.status, url=sys.argv[3]))
console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
console.print(screen(facts, Size(COLUMNS, ROWS, False)))
svg = console.export_svg(title="elastic-pt status --watch", unique_id="live")
# A page that shows the picture loads no fonts.
Path(sys.argv[2]).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))
