"""Figures and pages show the data that they are made of, and are refused data that are none."""

import html.parser
import json
import zipfile

import numpy as np
import pytest
from matplotlib.image import imread

from fireq_jax.evaluation import Evaluation, Protocol
from fireq_jax.evaluation.activations import ActivationStatistics, InputStatistics
from fireq_jax.evaluation.plots import STYLES, plot_layer, plot_overview, save_figures, subject_of
from fireq_jax.evaluation.report import write_report
from fireq_jax.evaluation.smoothing_effect import read_smoothing

LAYERS, WIDTHS = 3, {"qkv_input": 64, "o_input": 32, "gate_up_input": 64, "down_input": 2000}


def statistics_of(seed, outlier=1.0):
    """Of three layers; channel 1999 of the last layer's down_proj is ``outlier`` times as large as others."""
    random = np.random.default_rng(seed)
    inputs = {
        name: InputStatistics(random.uniform(1, 2, (LAYERS, width)), random.uniform(3, 9, LAYERS))
        for name, width in WIDTHS.items()
    }
    inputs["down_input"].absmax[-1, -1] = 1.5 * outlier
    hidden = random.uniform(1, 2, (2, LAYERS + 1))
    keys = random.uniform(1, 2, (LAYERS, 2, 16))
    return ActivationStatistics(512, hidden[0] * 9, hidden[1], random.uniform(0, 1, LAYERS), inputs, keys)


@pytest.fixture
def folder(tmp_path):
    """A converted model's, as far as figures read it: one layer was smoothed, one linear layer stayed float."""
    keys = {f"layers.1.keys.{moment}": np.full((2, 16), 3.0) for moment in ("before", "pre_rope", "post_rope")}
    experts = {name.replace("mlp", "mlp.experts"): array for name, array in LINEAR.items()}
    np.savez(tmp_path / "smoothing.npz", **LINEAR, **experts, **keys)
    errors = [{"weight_error": {"mlp.down_proj": 0.1, "self_attn.qkv_proj": 0.2}}, {"weight_error": {}}, {}]
    report = {"layers": {f"layers.{i}": error for i, error in enumerate(errors)}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_overview_before_and_after(folder, tmp_path):
    subject = subject_of("new", folder, statistics_of(0, outlier=40), ("old", statistics_of(1)))
    assert list(subject.errors) == ["self_attn.qkv_proj", "mlp.down_proj"]
    np.testing.assert_array_equal(subject.errors["mlp.down_proj"], [0.1, np.nan, np.nan])
    figure = plot_overview(subject)
    assert figure.get_suptitle() == "new (before: old)"
    found = titles(figure)
    assert len(found) == 2 * 5 + 5
    assert any(title.startswith("input of down_proj, after: at most 40") for title in found)
    figure.savefig(tmp_path / "a.png")
    image = np.asarray(imread(tmp_path / "a.png"))[..., :3]
    assert image.shape[1] == 1300
    for style in STYLES:
        wanted = np.asarray([int(style["color"][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 100
    # The outlier is there, though a map has fewer pixels than there are channels.
    shown = figure.axes[[axes.get_title(loc="left") for axes in figure.axes].index(found[9])].images[0].get_array()
    assert shown[-1, -1] == shown.max() > shown[:, :-1].max()


def test_overview_of_one_model(tmp_path):
    figure = plot_overview(subject_of("only", tmp_path, statistics_of(0)))
    assert figure.get_suptitle() == "only"
    assert len(titles(figure)) == 5 + 4
    other = statistics_of(1)
    different = ActivationStatistics(**{**vars(other), "keys": other.keys[:2]})
    assert subject_of("new", tmp_path, statistics_of(0), ("old", different)).before is None


def test_pages_of_layers(folder):
    subject = subject_of("new", folder, statistics_of(0))
    assert len(titles(plot_layer(subject, 0))) == 4 + 2 + 2
    keys = next(axes for axes in plot_layer(subject, 1).axes if "kv head 1 of 2" in axes.get_title(loc="left"))
    assert [set(line.get_ydata()) for line in keys.lines] == [{3.0}, set(subject.statistics.keys[1, 1])]
    paths = save_figures(subject, folder / "figures", [2])
    assert [path.name for path in paths] == ["overview.png", "layer.02.png"]
    assert set((folder / "figures").iterdir()) == set(paths)
    with pytest.raises(ValueError, match="layer is 3; expected 0 to 2"):
        plot_layer(subject, 3)
    (folder / "report.json").write_text('{"layers": {"layers.0": {"weight_error": []}}}')
    with pytest.raises(ValueError, match=rf"^{folder}/report\.json: weight_error is"):
        subject_of("new", folder, statistics_of(0))
    np.savez(folder / "smoothing.npz", **KEYS)
    with pytest.raises(ValueError, match=r"another model: layers\.1\.keys is \(1, 4\); expected \(2, 16\)"):
        subject_of("new", folder, statistics_of(0))


class Page(html.parser.HTMLParser):
    """Tags of a page, in order, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_report_is_one_file(folder, tmp_path):
    protocol = Protocol("text.txt", False, 900, 16, 16, 2, 30)
    results = [Evaluation("a", 9.0, 30, 100), Evaluation("<b>&", 9.9, 30, 50, 0.1, 0.02, 0.9, protocol)]
    subject = subject_of("<b>&", folder, statistics_of(0))
    write_report(tmp_path / "a.html", results, {"<b>&": subject}, command=["run", "a b"], layers=[1])
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert page.count("img") == 2
    assert page.count("details") == 1
    assert page.count("b") == 0
    assert page.count("tr") == 1 + 2 + 1 + LAYERS
    assert "run &#x27;a b&#x27;" in text
    assert "+10.00%" in text
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))


LINEAR = {f"layers.0.mlp.down_proj.{moment}": np.ones(4, np.float32) for moment in ("before", "after")}
KEYS = {f"layers.1.keys.{moment}": np.ones((1, 4), np.float32) for moment in ("before", "pre_rope", "post_rope")}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"../../outside.before": np.ones(4)}, "holds '../../outside.before'; expected names such as"),
        ({"/tmp/outside.before": np.ones(4)}, "holds '/tmp/outside.before'"),
        ({"layers.0.mlp.down_proj/../x.before": np.ones(4)}, "holds 'layers.0.mlp.down_proj/../x.before'"),
        ({"layers.\u0661.keys.before": np.ones(4)}, "expected names such as"),
        ({"layers.0.mlp.down_proj.before": np.ones(4)}, "expected before, after"),
        ({**LINEAR, "layers.0.mlp.down_proj.between": np.ones(4)}, "expected before, after"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.ones(5)}, r"expected the same"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.ones((4, 1))}, r"has shape \(4, 1\); expected \[K\]"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.full(4, "a")}, "could not convert"),
        ({**KEYS, "layers.1.keys.before": np.ones(4)}, r"has shape \(4,\); expected \[kv_heads, H\]"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.asarray([{}] * 4)}, "cannot be read: Object arrays"),
    ],
)
def test_other_arrays_are_refused_by_the_file_s_name(tmp_path, arrays, message):
    np.savez(tmp_path / "smoothing.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/smoothing\.npz.*{message}"):
        read_smoothing(tmp_path)


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "smoothing.npz"
    with pytest.raises(ValueError, match=f"{file} is missing"):
        read_smoothing(tmp_path)
    np.savez(file, **LINEAR)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:-40], whole[:60] + bytes(40) + whole[100:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            read_smoothing(tmp_path)
    huge = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("layers.0.mlp.down_proj.before.npy", huge.ljust(128))
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        read_smoothing(tmp_path)
