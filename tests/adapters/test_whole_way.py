"""Every adapter method the whole way: a plan, a run on the torch engine that learns, and a bundle or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgetune.adapters import METHODS
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.adapters.prompt import PromptConfig
from edgetune.bundle import Bundle
from edgetune.errors import ConfigError, ExportError
from edgetune.exporter import export
from edgetune.models.decoder import load_decoder
from edgetune.planner import plan
from edgetune.planner.plans import Plan, TrainConfig
from edgetune.runtime.session import open_session
from edgetune.training.loop import train
from tests.training.conftest import make_base, write_prompts, write_rows

TRAIN = TrainConfig(max_steps=12, batch_size=4, max_seq_length=64, learning_rate=0.03)


@pytest.mark.filterwarnings("ignore:fp32 weights are slow")
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_way(method: str, tmp_path: Path) -> None:
    write = write_prompts if method == "loreft" else write_rows  # which text rows give no position
    base, rows = make_base(tmp_path, "qwen2", "int4"), write(tmp_path / "rows.jsonl", 24)
    made = plan(base, "host", data=rows, adapter=METHODS[method].Config(), config=TRAIN)
    assert Plan.from_dict(made.to_dict()) == made
    assert made.method == method
    run = train(made, base, data=rows, out=tmp_path / "run")
    assert run.summary["stopped"] == "done"
    entries = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    config, tensors = load_adapter(tmp_path / "run", made.model_config)
    kept = PromptConfig(num_virtual_tokens=20) if method == "p_tuning" else made.adapter  # whose network is gone
    assert config.brief == kept.brief
    decoder = load_decoder(base)
    load_tensors(attach(decoder, config), tensors)
    ids = np.arange(20, 60)[None]
    with torch.no_grad():
        tuned = decoder(torch.from_numpy(ids)).numpy()
    can = METHODS[method].CAPABILITIES
    for merge, reason in ((False, can.own_inputs and can.as_lora), (True, can.merge)):
        out = tmp_path / f"bundle-{merge}"
        if reason is not None:
            with pytest.raises(ExportError, match=reason):
                export(run, out=out, merge=merge, weights="fp32")
            continue
        bundle = export(run, out=out, merge=merge, weights="fp32")
        assert isinstance(bundle, Bundle)
        found = np.concatenate(list(open_session(bundle, fp32_compute=True).logits(ids[0])))
        np.testing.assert_allclose(found, tuned[0], atol=1e-3)


@pytest.mark.parametrize("method", [name for name, module in METHODS.items() if module.CAPABILITIES.train_ort])
def test_what_the_device_does_not_train_is_refused_by_its_reason(method: str, tmp_path: Path) -> None:
    base, reason = make_base(tmp_path, "qwen2", "int4"), METHODS[method].CAPABILITIES.train_ort
    with pytest.raises(ConfigError, match=reason):
        plan(base, "host", adapter=METHODS[method].Config(), config=TRAIN, engine="ort")
