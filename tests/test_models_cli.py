"""Models that users bring along, through the `ulearn` command: from the file to a board that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import onnx_models
import tflite_models
import ulearn
from test_cli import run
from ulearn_host import emulate
from ulearn_host.compiler import Options, compile_plan
from ulearn_host.errors import UserError
from ulearn_host.importers import rows
from ulearn_host.onnx_import import load_onnx
from ulearn_host.tflite_import import load_tflite


def test_a_tflite_model_learns_on_a_board(tmp_path: Path) -> None:
    """prepare, inspect, deploy, train and evaluate: an int8 .tflite gets in and its last layer learns on the board."""
    (tmp_path / "net.tflite").write_bytes(small_classifier())
    network = load_tflite(tmp_path / "net.tflite")
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (160, network.input.size)).astype(np.int8)
    model = ulearn.load(compile_plan(network, Options("none")).data)
    features = np.stack([np.frombuffer(bytes(model.features(x.tobytes())), np.int8) for x in codes]).astype(float)
    wanted = rng.normal(size=(features.shape[1], network.output.size))
    y = ((features - features.mean(axis=0)) @ wanted).argmax(axis=1)  # something that the last layer can learn
    np.savez(tmp_path / "mine.npz", x=network.input.real(codes), y=y)
    done = run("prepare", tmp_path / "net.tflite", "--calibration", tmp_path / "mine.npz", "--labels", "a,b,c,d")
    assert "trains dense_1/weights, dense_1/bias" in done.stdout
    facts = json.loads(run("inspect", tmp_path / "net.ulm", "--json").stdout)
    assert facts["meta"]["scheme"] == "last" and facts["meta"]["labels"] == ["a", "b", "c", "d"]
    assert {board["board"] for board in facts["boards"]} >= {"RPI_PICO", "ESP32_GENERIC", "QEMU_CORTEX_M0"}
    with emulate.start("UNIX") as board:
        run("deploy", tmp_path / "net.ulm", "--port", board.port)
        line = run("train", tmp_path / "net.ulm", "--port", board.port, "--data", tmp_path / "mine.npz", "--epochs", 8,
                   "--holdout", 0.3, "--json").stdout  # fmt: skip
    result = json.loads(line)
    assert result["after"] > result["before"] + 0.15, result


def small_classifier() -> bytes:
    """An image network of four classes, convolution, depthwise, mean and dense, with a softmax."""
    net = tflite_models.Net(5)
    x = net.conv(net.input([1, 8, 8, 2]), 16, stride=(2, 2))
    x = net.mean(net.depthwise(x))
    return net.finish(net.softmax(net.dense(x, 4)))


def test_an_onnx_model_is_quantised(tmp_path: Path) -> None:
    """Float ONNX needs samples to be quantised, then becomes a plan; without them that is said."""
    case = onnx_models.FLOAT["softmax"]
    onnx_models.save(case.made("softmax"), tmp_path / "net.onnx")
    refused = run("prepare", tmp_path / "net.onnx", fails=True)
    assert "--calibration" in refused.stderr or "samples" in refused.stderr
    np.savez(tmp_path / "c.npz", x=onnx_models.samples("softmax", case))
    run("prepare", tmp_path / "net.onnx", "--calibration", tmp_path / "c.npz")
    assert ulearn.load(str(tmp_path / "net.ulm")).training is not None


def test_unsupported_models_are_refused_by_name(tmp_path: Path) -> None:
    """One sentence on stderr with the operator's name."""
    for name, model, word in tflite_models.unsupported_models():
        (tmp_path / f"{name}.tflite").write_bytes(model)
        done = run("prepare", tmp_path / f"{name}.tflite", fails=True)
        assert word in done.stderr or "expected int8" in done.stderr
        assert not (tmp_path / f"{name}.ulm").exists()


def test_channels_first_or_last(tmp_path: Path) -> None:
    """Labelled ONNX samples calibrate the training, and images count the same with channels first or last."""
    case = onnx_models.FLOAT["conv"] if "conv" in onnx_models.FLOAT else next(iter(onnx_models.FLOAT.values()))
    model = onnx_models.save(case.made("conv"), tmp_path / "net.onnx")
    x = onnx_models.samples("conv", case)
    network = load_onnx(model, x)
    assert x.ndim == 4 and network.input.shape == (x.shape[2], x.shape[3], x.shape[1])
    last = x.transpose(0, 2, 3, 1)
    assert (rows(x, network.input.shape, "x") == last.reshape(len(x), -1)).all()
    assert (rows(last, network.input.shape, "x") == last.reshape(len(x), -1)).all()
    with pytest.raises(UserError, match="expected"):
        rows(x[:, :, 1:], network.input.shape, "x")
    case = onnx_models.FLOAT["softmax"]
    onnx_models.save(case.made("softmax"), tmp_path / "small.onnx")
    x = onnx_models.samples("softmax", case)
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(len(x)) % 5)
    assert "trains" in run("prepare", tmp_path / "small.onnx", "--calibration", tmp_path / "c.npz").stdout


def test_what_a_plan_is_made_from_stays(tmp_path: Path) -> None:
    """--out may not name the model."""
    path = tmp_path / "net.tflite"
    path.write_bytes(small_classifier())
    refused = run("prepare", path, "-o", path, fails=True)
    assert "would overwrite" in refused.stderr and path.read_bytes() == small_classifier()
