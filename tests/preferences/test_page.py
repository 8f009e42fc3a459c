"""The page in a browser where there is one, and what it answers to requests of any kind."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import threading
import zlib

import numpy as np
import pytest
from toy_preferences import write_toy_pairs

from flowpolicy import ConfigError, DataError, FlowPolicyError
from flowpolicy.preferences.page import LabelConfig, LabelPage, png


@contextlib.contextmanager
def served(store):
    with LabelPage(LabelConfig(pairs=str(store))) as page:
        thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield page
        finally:
            page.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with served(write_toy_pairs(tmp_path_factory.mktemp("page") / "toy.zarr")) as page:
        yield page


def request(page, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection(*page.server_address, timeout=5)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def answer(page, pair, value, **headers):
    body = json.dumps({"pair": pair, "answer": value})
    return request(page, "/answer", "POST", body, **{"X_Token": page.token, **headers})[0].status


def test_a_clip_holds_the_frames_of_its_segment(page):
    response, content = request(page, "/clip/1/right")
    frames = page.clip(1, "right")
    assert int(response.headers["X-Frames"]) == len(frames) == 4
    assert content == png(frames.reshape(-1, 12, 3))
    body = content[content.index(b"IDAT") + 4 :]
    lines = np.frombuffer(zlib.decompressobj().decompress(body), np.uint8).reshape(4 * 8, 1 + 12 * 3)
    assert (lines[:, 0] == 2).all()
    decoded = np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8)  # as a reader of PNG does it
    np.testing.assert_array_equal(decoded.reshape(frames.shape), frames)


def test_answers_are_on_disk_at_once_and_a_later_page_goes_on(tmp_path):
    store = write_toy_pairs(tmp_path / "toy.zarr")
    with served(store) as page:
        assert [answer(page, *given) for given in ((0, "left"), (2, "equal"), (0, "right"))] == [200] * 3
        saved = json.loads((tmp_path / "toy.labels.json").read_text())["answers"]
        assert saved == {"0": "right", "2": "equal"}
        with pytest.raises(DataError, match="being labelled on another page"):
            LabelPage(LabelConfig(pairs=str(store)))
    with served(store) as page:
        state = json.loads(request(page, "/state")[1])
    assert state == {"pairs": 3, "fps": 20.0, "answers": {"0": "right", "2": "equal"}}
    text = (tmp_path / "toy.labels.json").read_text()
    (tmp_path / "toy.labels.json").write_text(text.replace('"2"', '"7"'))
    with pytest.raises(DataError, match=r"toy.labels.json is damaged"):
        LabelPage(LabelConfig(pairs=str(store)))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["toy.labels.json", "toy.zarr"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Host": "evil.example"}, 403),  # a name that was made to mean this machine
        ("/state", {"Origin": "http://evil.example"}, 403),
        ("/../../etc/passwd", {}, 404),
        ("/clip/3/left", {}, 404),
        ("/clip/-1/left", {}, 404),
        ("/page.html", {}, 404),
    ],
)
def test_what_is_not_the_pages_own_is_refused(page, path, headers, status):
    assert request(page, path, **headers)[0].status == status


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"pair": 0, "answer": "left"}', {"X_Token": "guess"}, 403),
        ('{"pair": 0, "answer": "left"}', {"Origin": "http://evil.example"}, 403),
        ('{"pair": 0, "answer": "left"}', {"Content_Length": "99999999"}, 413),
        ('{"pair": 0, "answer": "left"}', {"Content_Length": "-1"}, 413),
        ('{"pair": 9, "answer": "left"}', {}, 400),
        ('{"pair": true, "answer": "left"}', {}, 400),
        ('{"pair": 0, "answer": "both"}', {}, 400),
        ("[" * 1000, {}, 400),
        (b"\xff", {}, 400),
    ],
)
def test_no_hostile_request_changes_an_answer(page, body, headers, status):
    before = dict(page.answers.given)
    assert request(page, "/answer", "POST", body, **{"X_Token": page.token, **headers})[0].status == status
    assert page.answers.given == before


def test_the_page_takes_nothing_from_elsewhere_and_a_silent_visitor_holds_up_nobody(page):
    with socket.create_connection(page.server_address):
        response, content = request(page, "/")
    assert page.server_address[0] == "127.0.0.1"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert b"http" not in content
    assert b"@" not in content.replace(b"@media", b"")


def test_an_answer_that_cannot_be_kept_is_not_acknowledged(page, monkeypatch):
    def full(path, content):
        raise FlowPolicyError("The disk is full.")

    monkeypatch.setattr("flowpolicy.preferences.labels.write_json", full)
    before = dict(page.answers.given)
    assert answer(page, 1, "left") == 500
    assert page.answers.given == before


def test_a_store_without_frames_and_a_taken_port_are_one_sentence(tmp_path, page):
    store = write_toy_pairs(tmp_path / "toy.zarr", frames=False)
    with pytest.raises(DataError, match="collect pairs with video=true"):
        LabelPage(LabelConfig(pairs=str(store)))
    store = write_toy_pairs(tmp_path / "other.zarr")
    with pytest.raises(FlowPolicyError, match="is not free; choose another port"):
        LabelPage(LabelConfig(pairs=str(store), port=page.server_address[1]))
    with pytest.raises(ConfigError, match="port is 70000"):
        LabelConfig(pairs="store", port=70_000)


def test_a_person_labels_by_keyboard_and_mouse_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("FLOWPOLICY_TEST_CHROMIUM") or shutil.which("chromium")
    with served(write_toy_pairs(tmp_path / "toy.zarr")) as page, playwright.sync_playwright() as browsers:
        try:
            browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        tab, complaints = browser.new_page(), []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))

        def shows(text):
            tab.wait_for_selector(f"text={text}")
            tab.wait_for_selector("main[aria-busy=false]")

        tab.goto(page.address)
        shows("Pair 1 of 3, 0 labelled")
        tab.wait_for_selector("canvas#left[width='12'][height='8']")
        tab.keyboard.press("ArrowRight")
        shows("Pair 2 of 3")
        tab.keyboard.press("ArrowDown")
        shows("Pair 3 of 3")
        tab.keyboard.press("Backspace")
        shows("Pair 2 of 3, 2 labelled")
        assert tab.get_attribute("[data-answer=equal]", "aria-pressed") == "true"
        tab.click("[data-answer=left]")
        shows("Pair 3 of 3")
        tab.reload()  # goes on where it was
        shows("Pair 3 of 3, 2 labelled")
        tab.keyboard.press("ArrowLeft")
        shows("All 3 pairs are labelled")
        browser.close()
        assert complaints == []
        assert page.answers.given == {0: "right", 1: "left", 2: "left"}
