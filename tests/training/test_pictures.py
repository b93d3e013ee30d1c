import re
from html.parser import HTMLParser

import pytest
import torch

from stabletx.training import classification_metrics, plots, report
from stabletx.training.attention_maps import AttentionMap

pytest.importorskip("matplotlib", reason="needs matplotlib")

EVENTS = [
    {"event": "step", "step": i, "epoch": 1, "loss": 1 / i, "accuracy": 1 - 1 / i}
    for i in range(1, 30)
] + [{"event": "validation", "step": 29, "epoch": 1, "loss": 0.1, "accuracy": 0.9, "is_best": True}]


def metrics_of(n_classes, name="class {}"):
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4 * n_classes) % n_classes
    noise = torch.randn(len(truth), n_classes, generator=generator)
    labels = [name.format(i) for i in range(n_classes)]
    return classification_metrics(noise.softmax(1), truth, labels)


def drawn(draw, size=(6.4, 4.6)):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    assert draw(ax) is ax
    canvas.draw()
    return figure, canvas.get_renderer()


ATTENTION = AttentionMap(
    ["[CLS]", "what", "$x$", "a", "##wordthatislongerthantheroom"],
    torch.eye(5), "a label that is much too long", "yes", 0.87,
)  # fmt: skip
PICTURES = {
    "loss": lambda ax: plots.plot_loss(ax, EVENTS),
    "accuracy": lambda ax: plots.plot_accuracy(ax, EVENTS),
    "no steps": lambda ax: plots.plot_loss(ax, []),
    "confusion": lambda ax: plots.plot_confusion(ax, metrics_of(2)),
    "confusion of many": lambda ax: plots.plot_confusion(ax, metrics_of(60)),
    "confusion of long names": lambda ax: plots.plot_confusion(ax, metrics_of(4, "x" * 60 + "{}")),
    "calibration": lambda ax: plots.plot_calibration(ax, metrics_of(3)),
    "attention of many": lambda ax: plots.plot_attention(
        ax, AttentionMap([f"token{i}" for i in range(40)], torch.eye(40), "a", "b", 0.5)
    ),
    "attention": lambda ax: plots.plot_attention(ax, ATTENTION),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_has_a_white_edge_so_that_no_word_is_cut(name, tmp_path):
    from matplotlib.image import imread

    size = (8.8, 7.8) if "attention" in name else (6.4, 4.6)
    pixels = imread(plots.save_picture(tmp_path / "picture.png", PICTURES[name], size=size))
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert float(edge.min()) == 1.0


@pytest.mark.parametrize("name", ["confusion", "attention", "confusion of long names"])
def test_names_on_the_vertical_axis_do_not_overlap(name):
    figure, renderer = drawn(PICTURES[name])
    ax = figure.axes[0]
    boxes = [label.get_window_extent(renderer) for label in ax.get_yticklabels()]
    assert len(boxes) > 1
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not a.overlaps(b)


def test_picture_is_a_png_file(tmp_path):
    path = plots.save_picture(tmp_path / "loss.png", PICTURES["loss"])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_matplotlib_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.save_picture(tmp_path / "loss.png", PICTURES["loss"])
    assert plt.get_fignums() == before


class Balanced(HTMLParser):
    """Check that each tag that is opened is closed in its turn, and gather what is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        self.loaded += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_needs_nothing_beside_it(tmp_path):
    picture = plots.save_picture(tmp_path / "loss.png", PICTURES["loss"])
    evil = '<script>alert(1)</script> & "quotes"'
    page = report.render(
        evil,
        [
            report.Section(
                evil,
                [
                    report.paragraph(evil, "warn"),
                    report.table([evil], [[evil], [0.5]]),
                    report.preformatted(evil),
                    report.folded(evil, [report.settings({evil: evil})]),
                    report.picture(picture, evil),
                ],
            )
        ],
    )
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page
    assert "0.500" in page
    assert all(own.startswith("data:image/png;base64,") for own in parser.loaded)
    assert not re.search(r"https?:", page)
