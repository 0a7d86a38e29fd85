import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import narrowcast as nc
from narrowcast.graph import Graph, Plan
from narrowcast.runtime import certify


def make_plan(kind="generic", **assets):
    module = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 5)).eval()
    x = torch.randn(4, 12)
    shapes = ({0: torch.export.Dim.AUTO},)
    graph = Graph.from_exported(torch.export.export(module, (x,), dynamic_shapes=shapes))
    plan = Plan(graph, kind, "fp32", assets=assets)
    with torch.no_grad():
        certify(plan, [((x,), (module(x),)) for x in (torch.randn(3, 12), torch.randn(1, 12))])
    return plan, module


def test_a_saved_plan_runs_and_verifies(tmp_path):
    plan, module = make_plan()
    plan.save(tmp_path / "a.plan")
    x = torch.randn(7, 12)
    exe = nc.load(tmp_path / "a.plan", device="cpu", threads=1)
    torch.testing.assert_close(exe(x), module(x).detach())
    report = nc.verify(tmp_path / "a.plan", device="cpu")
    assert report.ok and len(report.checks) == 2 and report.checks[0].error < 1e-6
    assert json.dumps(report.as_dict()) and "tolerance" in str(report)
    with pytest.raises(nc.ArgumentError, match=r"must be float32 \[\*, 12\]"):
        exe(torch.randn(7, 11))


def test_drift_is_an_error():
    plan, _ = make_plan()
    plan.graph.weights["0.weight"] = plan.graph.weights["0.weight"] * 1.01
    with pytest.raises(nc.VerificationError, match="DRIFT"):
        nc.verify(plan, device="cpu")
    plan.graph.weights["0.weight"] = plan.graph.weights["0.weight"] * float("nan")
    with pytest.raises(nc.VerificationError, match="error nan"):
        nc.verify(plan, device="cpu")


def test_a_plan_without_certificate_cannot_verify():
    plan, _ = make_plan()
    plan.certificate = {}
    with pytest.raises(nc.VerificationError, match="no certificate"):
        nc.verify(plan)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.samples.pop("reference.1.0"),
        lambda p: p.samples.pop("input.0.0"),
        lambda p: p.samples.update({"other": torch.zeros(1)}),
        lambda p: p.samples.update({"reference.0.0": torch.zeros(3, 4)}),
        lambda p: p.samples.update({"reference.0.1": torch.zeros(3, 5)}),
        lambda p: p.certificate["replay"].pop(),
        lambda p: p.certificate["replay"][0].pop("tolerance"),
        lambda p: p.certificate.update(replay="x"),
    ],
)
def test_a_damaged_certificate_is_a_format_error(damage):
    plan, _ = make_plan()
    damage(plan)
    with pytest.raises(nc.FormatError, match="not well formed"):
        nc.verify(plan, device="cpu")


def test_importing_is_lazy():
    code = (
        "import sys, torch; before = set(sys.modules); import narrowcast as nc;"
        "new = set(sys.modules) - before;"
        "assert not any(m.startswith(('narrowcast.runtime', 'narrowcast.graph')) for m in new), new;"
        "assert 'load' in dir(nc) and nc.load and nc.Executor and nc.Plan;"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = nc.nothing
