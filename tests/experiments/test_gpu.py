"""The script for a machine with a GPU: what it says where something is missing, and what it keeps."""

import json

import pytest
import torch

from experiments.bench import gpu


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDS", ("torch", "no-such-package"))
    assert gpu.main(["--device", "cpu", "--size", "tiny"]) == 2
    assert "missing: the package no-such-package: pip install no-such-package" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_is_told_so(capsys):
    assert gpu.main([]) == 2
    assert "finds none" in capsys.readouterr().err


def test_a_part_that_fails_or_hangs_ends_and_results_are_kept(tmp_path, monkeypatch, capsys):
    parts = [
        gpu.Part("good", ["-c", "import os; print('{\"a\": ' + os.environ['N'] + '}'); print('fine')"], 60, {"N": "7"}),
        gpu.Part("bad", ["-c", "raise SystemExit(3)"], 60),
        gpu.Part("slow", ["-c", "import time; print('begun', flush=True); time.sleep(600)"], 2),
    ]
    monkeypatch.setattr(gpu, "parts", lambda device, size: parts)
    monkeypatch.setattr(gpu, "tables", lambda told: "")
    assert gpu.main(["--device", "cpu", "--size", "tiny", "--out", str(tmp_path)]) == 1
    assert "checks-captured: left out, CUDA graphs need a GPU" in capsys.readouterr().out
    good, bad, slow = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (good["status"], good["results"], good["end"]) == ("passed", [{"a": 7}], ["fine"])
    assert bad["status"] == "failed with exit status 3"
    assert slow["status"] == "stopped after 2 s, its limit" and slow["end"] == ["begun"]
    assert (tmp_path / "slow.log").read_text() == "begun\n"


def test_parts_left_when_the_time_is_over_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda device, size: [gpu.Part("late", ["-c", ""], 60)])
    monkeypatch.setattr(gpu, "tables", lambda told: "")
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["status"] == "left out"


def test_the_tables_hold_medians_of_ratios_within_a_repeat():
    told = {
        "machine": {"device": "X", "cores": 2, "python": "3", "torch": "2", "cuda": "none", "transformers": "5"},
        "parts": [
            {
                "command": "python x",
                "status": "passed",
                "seconds": 1.0,
                "end": ["ok"],
                "results": [
                    {
                        **dict(model="tiny", dtype="float32", search="beam", beams=5, batch=4, tokens=8, floor=0.001),
                        "decode": {"transformers": [0.01, 0.02, 0.04], "[]": [0.02, 0.02, 0.02]},
                        "prefill": {"transformers": [0.1, 0.1, 0.1], "[]": [0.2, 0.2, 0.2]},
                    }
                ],
            }
        ],
    }
    text = gpu.tables(told)
    assert "| `transformers` | 20.0 | 1.00 | 1.00-1.00 | 200 | 5% | 100 | 1.00 |" in text
    assert "| `[]` | 20.0 | 1.00 | 0.50-2.00 | 200 | 5% | 200 | 2.00 |" in text
    assert "tiny, float32, beam, 5 beams, batch 4; 8 tokens, 3 repeats. The floor, reading every weight" in text


def test_every_part_can_start():
    for size in ("full", "tiny"):
        names = [part.name for part in gpu.parts("cpu", size)]
        assert names[:3] == ["checks-float32", "checks-bfloat16", "checks-compiled"] and len(names) == 6
    on_gpu = {part.name: part for part in gpu.parts("cuda", "full")}
    assert sum(part.limit for part in on_gpu.values()) <= 540
    assert on_gpu["checks-captured"].environment["COMPILE"] == "captured"
    assert {"[] captured", "[] compiled", "[]"} <= set(on_gpu["speed-compiled"].arguments)
