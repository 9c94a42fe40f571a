"""``latemax.viz.search_page``: what the page says, and what it does in a browser by mouse and keyboard."""

import base64
import html.parser
import json

import browser
import pytest
import torch

import latemax
from latemax import PatchStore, StoreWriter, topk
from latemax.viz import search_page

image = pytest.importorskip("PIL.Image", reason="pictures are made with Pillow")
pytest.importorskip("safetensors", reason="stores are written with safetensors")

EYE = torch.eye(4)
# two pieces of "red", one of "fox", one of no word
Q, WORDS, WORD_OF = EYE[[0, 0, 1, 2]], ["red", "fox"], [0, 0, 1, -1]
ODD = "</script><b>&amp;\u202e\x00'\""
PLACES = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 1, 1], [float("nan")] * 4])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents by score: a 2 x 3 grid on a crop, regions, no grid, and nothing."""
    path = tmp_path_factory.mktemp("page") / "store"
    with StoreWriter(path, meta={"model": "tiny <model>"}) as writer:
        tokens = torch.zeros(6, 4)
        tokens[5, 0], tokens[1, 1], tokens[2, 0] = 2, 3, 1
        writer.add(tokens, "grid", (2, 3), {"crop": [0.25, 0, 0.75, 1]})
        writer.add(EYE, ODD, regions=PLACES)
        writer.add(EYE[:2] / 2, "no grid")
        writer.add(torch.empty(0, 4), "empty")
    return PatchStore(path)


def blank(i):
    return image.new("RGB", (60, 40), "white")


def make(store, q=Q, k=4, **options):
    options = {"words": WORDS, "word_of": WORD_OF, "images": blank, "query": "red fox", **options}
    return search_page(q, topk(q, store, k, return_argmax=True), store, **options)


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self.inside = [], [], {}, ("", {})
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes))

    def handle_endtag(self, tag):
        self.inside = ("", {})

    def handle_data(self, data):
        tag, attributes = self.inside
        if tag == "script":
            self.scripts[attributes.get("type", "js")] = data
        elif tag != "style":
            self.texts.append(data.strip())

    def data(self):
        return json.loads(self.scripts["application/json"])


class TestText:
    def test_ranks_scores_and_parts(self, store):
        page = Parsed(make(store))
        results = page.data()["results"]
        assert [result["parts"] for result in results] == [
            ["7.0000", "4.0000", "3.0000", "0.0000"],
            ["4.0000", "2.0000", "1.0000", "1.0000"],
            ["1.5000", "1.0000", "0.5000", "0.0000"],
            ["0.0000"] * 4,
        ]
        # each once; the third token of the grid scores 0 everywhere, the first of equals is its argmax
        assert results[0]["hits"] == [[0, 1, 5], [5], [1], [0]] and results[3]["hits"] == [[], [], [], []]
        assert results[0]["grid"] == [2, 3] and results[0]["crop"] == [0.25, 0, 0.75, 1]
        assert results[1]["regions"] == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 1, 1], None]
        assert "grid" not in results[2] and "regions" not in results[2] and results[2]["heat"] == []
        assert page.texts.count("score 7.0000") == 1 and "score −∞" in page.texts
        assert page.data()["labels"] == ["whole query", "“red”", "“fox”", "“other tokens”"]
        assert "4 of 4 documents in" in " ".join(page.texts) and "tiny <model>" in " ".join(page.texts)

    def test_one_scale_for_all_results(self, store):
        data = Parsed(make(store)).data()
        assert data["scales"] == [
            ["0.0000", "4.0000"],
            ["0.0000", "4.0000"],
            ["0.0000", "3.0000"],
            ["0.0000", "1.0000"],
        ]
        levels = [list(base64.b64decode(result["heat"][1])) for result in data["results"][:2]]
        assert levels == [[0, 0, 128, 0, 0, 255], [128, 0, 0, 0]]

    def test_normalized_as_the_search(self, store):
        found = topk(Q, store, 1, normalize=True, return_argmax=True)
        page = Parsed(search_page(Q, found, store, words=WORDS, word_of=WORD_OF, images=blank, normalize=True))
        (result,) = page.data()["results"]
        assert float(result["parts"][0]) == pytest.approx(float(found.scores[0]), abs=1e-3)
        assert sum(map(float, result["parts"][1:])) == pytest.approx(float(found.scores[0]), abs=1e-3)

    def test_text_is_escaped(self, store):
        text = make(store, words=[ODD, "fox"], query=ODD)
        page = Parsed(text)
        assert not {"b", "i"} & {tag for tag, _ in page.tags}
        assert sum(tag == "script" for tag, _ in page.tags) == 2
        assert "\x00" not in text and "\u202e" not in text
        assert page.texts.count("</script><b>&amp;\\u202e\\x00'\"") == 5 + 2 + 1

    def test_nothing_is_loaded_from_anywhere(self, store):
        text = make(store)
        page = Parsed(text)
        for _, attributes in page.tags:
            for name in ("src", "href", "srcset", "action"):
                assert attributes.get(name, "data:").startswith(("data:", "#"))
            assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in text and "@import" not in text
        (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
        assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy

    @pytest.mark.parametrize(("tokens", "labels"), [(3, 4), (64, 65), (65, 1)])
    def test_without_words(self, tokens, labels, store):
        q = EYE[torch.arange(tokens) % 4]
        page = Parsed(make(store, q, words=None, word_of=None, k=2))
        assert len(page.data()["labels"]) == labels
        assert any(text.startswith("The query has 65 tokens and no words") for text in page.texts) == (tokens == 65)

    def test_results_that_are_not_numbers(self, tmp_path):
        with StoreWriter(tmp_path / "s") as writer:
            writer.add(torch.tensor([[float("nan"), 1], [1, 0]]), "nan", (1, 2))
            writer.add(torch.tensor([[float("inf"), 1], [1, 0]]), "inf", (1, 2))
        store = PatchStore(tmp_path / "s")
        page = Parsed(make(store, torch.ones(1, 2), 2, words=["a"], word_of=None))
        assert {"score ∞", "score not a number"} <= set(page.texts)

    def test_no_result(self, store):
        found = latemax.TopK(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int32))
        page = Parsed(search_page(Q, found, store, words=WORDS, word_of=WORD_OF))
        assert "No document." in page.texts and page.data()["results"] == []

    def test_pictures_that_are_not_there_say_why(self, store):
        page = Parsed(make(store, images=None))
        assert page.texts.count("No picture: the store has no record of its file.") == 2
        assert sum(text.startswith("No picture: ") for text in page.texts) == 4
        assert not any(tag == "img" for tag, _ in page.tags)

    def test_pictures_are_small(self, store):
        big = make(store, k=1, images=lambda i: image.effect_noise((3000, 2000), 50), pixels=300)
        (shown,) = [attributes for tag, attributes in Parsed(big).tags if tag == "img"]
        assert (shown["width"], shown["height"]) == ("300", "200") and len(big) < 100_000

    def test_tokens_that_know_their_words(self, store):
        """As those by hand; padding is left out."""
        pad = torch.full((1, 2, 4), 9.0)
        text = latemax.TextTokens(
            torch.cat([Q[None], pad], 1), torch.arange(6)[None] < 4, [["re", "d", "fox", "?"]],
            torch.tensor([[*WORD_OF, -1, -1]]),
        )  # fmt: skip
        text.words = [WORDS]
        found = topk(text, store, 4, return_argmax=True)
        by_hand = make(store)
        assert search_page(text, found, store, query="red fox", images=blank) == by_hand
        assert search_page(text, found.row(0), store, query="red fox", images=blank) == by_hand
        with pytest.raises(ValueError, match="words and word_of must be None with TextTokens"):
            search_page(text, found, store, words=WORDS)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": Q[None]}, ValueError, "q must be one query"),
            ({"q": Q[:2]}, ValueError, "found must be the ranking of this query"),
            ({"argmax": None}, ValueError, r"found must have argmax: topk\(..., return_argmax=True\)"),
            ({"words": "red"}, TypeError, "words must be a list of strings"),
            ({"words": None}, ValueError, "word_of needs words"),
            ({"word_of": [0, 1]}, ValueError, "word_of must name a word for each of 4 tokens"),
            ({"word_of": [0, 1, 2, 0]}, ValueError, "word_of must be -1 or a number of one of 2 words"),
            ({"store": "pages"}, TypeError, "store must be the PatchStore"),
            ({"found": (1, 2)}, TypeError, "found must be a TopK"),
            ({"pixels": 0}, ValueError, "pixels must be an int >= 1"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_arguments(self, change, error, message, store):
        found = topk(Q, store, 2, return_argmax=True)
        if "argmax" in change:
            found = found._replace(**change)
            change = {}
        options = {"q": Q, "found": found, "store": store, "words": WORDS, "word_of": WORD_OF, **change}
        with pytest.raises(error, match=message):
            search_page(options.pop("q"), options.pop("found"), options.pop("store"), **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if browser.WHY_NOT:
        pytest.skip(browser.WHY_NOT)
    with browser.page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(page, store, tmp_path):
    """Opens the page at a width; after the test, checks that nothing was said and nothing loaded but the page."""
    path = tmp_path / "out.html"
    page.messages.clear()
    page.requests.clear()

    def show(width, **options):
        path.write_text(make(store, **options), encoding="utf-8")
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        page.open(path, width)
        return page

    yield show
    assert page.messages == [] and set(page.requests) == {path.as_uri()}


def place_of(page, selector, result=1):
    """Left, top, right and bottom of an element as fractions of the picture of a result."""
    return page.run(
        f"""(() => {{
            const picture = document.querySelectorAll('.picture')[{result - 1}];
            const a = picture.getBoundingClientRect(), b = picture.querySelector('{selector}').getBoundingClientRect();
            return [(b.left - a.left) / a.width, (b.top - a.top) / a.height,
                    (b.right - a.left) / a.width, (b.bottom - a.top) / a.height];
        }})()"""
    )


WHERE = "document.querySelectorAll('.where')[{}].textContent"
PRESSED = "[...document.querySelectorAll('.chip')].map(chip => chip.getAttribute('aria-pressed') === 'true')"
FOCUS = "document.activeElement.textContent.trim()"


class TestBrowser:
    @pytest.mark.parametrize("width", [360, 1440])
    def test_hover_shows_the_patch_of_a_word(self, width, shown):
        page = shown(width)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("document.querySelectorAll('.picture')[0].querySelectorAll('.hit').length") == 3
        page.hover(".chip:nth-child(2)")
        assert page.run(WHERE.format(0)) == "“red”: 4.0000 of the score, best patch: row 2, column 3"
        assert page.run("document.querySelectorAll('.picture')[0].querySelectorAll('.hit').length") == 1
        # the last of 2 x 3 patches on the middle half of the picture
        assert place_of(page, ".hit") == pytest.approx([0.25 + 1 / 3, 0.5, 0.75, 1], abs=0.01)
        assert place_of(page, "canvas") == pytest.approx([0.25, 0, 0.75, 1], abs=0.01)
        strength = page.run(
            "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 3, 2).data]"
            ".filter((_, i) => i % 4 === 3)"
        )
        assert strength == [0, 0, pytest.approx(53, abs=2), 0, 0, pytest.approx(209, abs=1)]
        page.hover(".chip:nth-child(3)")
        assert "“fox”: 3.0000 of the score, best patch: row 1, column 2" in page.run(WHERE.format(0))
        page.hover("h1")
        assert page.run(WHERE.format(0)) == "whole query, 3 best patches"

    def test_regions_and_documents_without_places(self, shown):
        page = shown(1440)
        assert page.run(WHERE.format(2)) == "whole query, 2 best tokens without a place"
        page.hover(".chip:nth-child(3)")
        assert place_of(page, ".hit", 2) == pytest.approx([0.5, 0, 1, 0.5], abs=0.01)
        # one row of the middle of the upper half
        row = page.run("[...document.querySelectorAll('canvas')[1].getContext('2d').getImageData(0, 128, 512, 1).data]")
        assert row[4 * 400 + 3] > row[4 * 100 + 3] == 0
        assert page.run(WHERE.format(2)) == "“fox”: 0.5000 of the score, best patch: token 2, which has no place"
        assert page.run(WHERE.format(3)) == "“fox”: 0.0000 of the score, no patch"
        page.hover(".chip:nth-child(4)")
        assert "row 1, column 1" in page.run(WHERE.format(0))

    def test_keyboard_only(self, shown):
        page = shown(1440)
        order = []
        for _ in range(6):
            page.key("Tab")
            order.append(page.run(FOCUS))
        assert order[:5] == ["Skip to the results", "whole query", "red", "fox", "other tokens"]
        assert order[5] == "Score by word of result 1"
        page.key("Tab", shift=True)
        page.key("Tab", shift=True)
        assert page.run(FOCUS) == "fox" and page.run(WHERE.format(0)).startswith("“fox”: 3.0000")
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.key("Enter")
        assert page.run(PRESSED) == [False, False, True, False]
        for _ in range(3):
            page.key("Tab")
        # pressed: it stays when the focus leaves
        assert page.run(WHERE.format(0)).startswith("“fox”")
        page.key("Escape")
        assert page.run(PRESSED) == [True, False, False, False] and page.run(WHERE.format(0)).startswith("whole query")

    def test_a_pressed_word_is_released(self, shown):
        page = shown(360)
        page.key("Tab")
        page.key("Tab")
        page.key(" ")
        assert page.run(PRESSED) == [False] * 4 and page.run(WHERE.format(0)) == ""
        assert page.run("document.querySelectorAll('.hit, .active').length") == 0

    def test_what_a_screen_reader_is_given(self, shown):
        page = shown(1440, words=["fox", "fox"])
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]

        def named(role):
            return [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == role and not n["ignored"]]

        assert named("button") == ["whole query", "fox (word 1)", "fox (word 2)", "other tokens"]
        assert named("heading")[:2] == ["red fox", "1. grid"] and len(named("heading")) == 5
        assert named("image") == [f"Picture of result {rank}" for rank in (1, 2, 3, 4)]
        assert len(named("rowheader")) == 3 * 4 and len(named("status")) == 1
        page.key("Tab")
        page.key("Tab")
        page.key("Tab")
        status = page.run("document.getElementById('status').textContent")
        assert status == "Result 1: “fox”: 4.0000 of the score, best patch: row 2, column 3"

    def test_reduced_motion(self, shown):
        page = shown(1440)
        duration = "getComputedStyle(document.querySelector('img')).transitionDuration"
        for value, expected in (("no-preference", "0.15s"), ("reduce", "0s")):
            features = [{"name": "prefers-reduced-motion", "value": value}]
            page.call("Emulation.setEmulatedMedia", features=features)
            assert page.run(duration) == expected
        page.call("Emulation.setEmulatedMedia", features=[])

    def test_without_javascript(self, shown):
        page = shown(360)
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.reload()
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        assert page.run("document.querySelectorAll('tbody tr').length") == 3 * 4
        assert page.run("document.querySelectorAll('.hit').length") == 0

    def test_200_results_and_a_long_query(self, page, tmp_path):
        torch.manual_seed(0)
        with StoreWriter(tmp_path / "many") as writer:
            for i in range(200):
                writer.add(torch.randn(64, 8), f"a/rather/long/path/to/the/file/number/{i}.pdf#page={i}", (8, 8))
        store = PatchStore(tmp_path / "many")
        q, words = torch.randn(40, 8), [f"word{i}" for i in range(40)]
        text = make(store, q, 200, words=words, word_of=None)
        (tmp_path / "out.html").write_text(text, encoding="utf-8")
        page.open(tmp_path / "out.html", 360)
        assert page.run("document.querySelectorAll('.result').length") == 200
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        # the words take less than half of the height, and scroll
        assert page.run("document.querySelector('.query').getBoundingClientRect().height <= innerHeight / 2")
        page.hover(".chip:nth-child(2)")
        assert page.run("document.querySelectorAll('.hit').length") == 200
