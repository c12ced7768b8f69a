"""Rows of text as the windows that `train_bundle.py` reads. It needs edgetune, on the machine where the rows are.

Run: python write_windows.py bundle/ rows.jsonl --max-seq-length 128 --out windows.json

An app that makes windows itself puts rows side by side as long as there is room: `input_ids` are their tokens, 0 behind
them; `position_ids` count from 0 in each row; `segment_ids` number the rows, -1 behind them; `labels` say at each
position what comes next, -100 where that is not to be learned, at the last position of each row and behind them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edgetune.data import pack, read_rows, stack
from edgetune.errors import EdgetuneError
from edgetune.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("rows", type=Path, help="JSON Lines, as `edgetune train --data` takes them")
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    try:
        rows = read_rows(flags.rows, load_tokenizer(flags.bundle), flags.max_seq_length)
    except EdgetuneError as error:
        sys.exit(str(error))
    windows = pack(rows, flags.max_seq_length)
    lists = [{key: value[0].tolist() for key, value in stack([window]).items()} for window in windows]
    flags.out.write_text(json.dumps(lists), encoding="utf-8")
    print(json.dumps({"windows": len(windows), "length": windows[0].length}))


if __name__ == "__main__":
    main()
