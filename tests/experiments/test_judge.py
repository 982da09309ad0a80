"""The client for judges, against a server of the test's own: ratings, what goes wrong, and going on."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from rich.console import Console

from experiments import judge
from experiments.inputs.errors import InputError
from experiments.judge.__main__ import main
from experiments.judge.endpoint import ATTEMPTS
from experiments.tasks import Item

GOOD = "Well.\ncorrectness: 7\ndetailedness: 5.5"


@pytest.fixture
def server():
    """A server that answers with `replies` in turn, the last again and again: a text, a status, or bytes of a body; it
    keeps requests in `seen`.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.seen.append((self.path, self.headers.get("Authorization"), body))
            reply = made.replies.pop(0) if len(made.replies) > 1 else made.replies[0]
            status, extra = (reply, {}) if isinstance(reply, int) else (200, {})
            if isinstance(reply, tuple):
                status, extra = reply
            text = (
                reply
                if isinstance(reply, bytes)
                else json.dumps(
                    {"choices": [{"message": {"content": reply}}]} if status == 200 else {"error": "[bold]no[/]"}
                ).encode()
            )
            self.send_response(status)
            for name, value in (extra | {"Content-Length": str(len(text))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.replies, made.seen, made.url = [GOOD], [], f"http://127.0.0.1:{made.server_port}/v1"
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def endpoint(server):
    waits = []
    made = judge.Endpoint(server.url, "judge-1", "secret", timeout=5, sleep=waits.append)
    made.waits = waits
    return made


def _captions(folder, n=3):
    for i in range(n):
        Image.new("RGB", (3000, 20), (250, 0, 0)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": f"A [red] thing {i}.", "stack": "[prunehal]"} for i in range(n)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, {row["image"]: Item(row["image"], None, folder / row["image"]) for row in rows}


def _quiet():
    return Console(file=io.StringIO())


@pytest.mark.parametrize(
    "bench, reply, found",
    [
        ("describe", GOOD, {"correctness": 7, "detailedness": 5.5}),
        ("describe", '{"Correctness": 10, "detailedness": 0}', {"correctness": 10, "detailedness": 0}),
        ("describe", "correctness: 7", None),
        ("describe", "correctness: 11\ndetailedness: 5", None),
        ("describe", "correctness: 7\ndetailedness: 5\ncorrectness: 3", None),
        ("describe", "I cannot rate this.", None),
        ("mmhal", "It says so.\n**Rating:** 2", {"rating": 2}),
        ("mmhal", "rating: -1", None),
        ("mmvet", "correctness: 0.4", {"correctness": 0.4}),
        ("mmvet", "0.4", None),
        ("mmvet", "incorrectness: 0.4", None),
    ],
)
def test_ratings_are_read(bench, reply, found):
    assert judge.ratings(reply, judge.BENCHES[bench]) == found


def test_the_judge_sees_picture_and_answer(tmp_path, server, endpoint):
    rows, pictures = _captions(tmp_path, 1)
    judge.judge(rows, pictures, "describe", endpoint, tmp_path / "out.jsonl", _quiet())
    ((path, header, body),) = server.seen
    text, shown = body["messages"][0]["content"]
    assert (path, header, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge-1", 0)
    assert "<answer>\nA [red] thing 0.\n</answer>" in text["text"]
    kind, data = shown["image_url"]["url"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and image.size[0] == judge.SIDE and image.getpixel((5, 1))[0] > 240
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (
        row["ratings"] == {"correctness": 7, "detailedness": 5.5}
        and row["reply"] == GOOD
        and (row["stack"], row["image"]) == ("[prunehal]", "0.png")
    )


def test_tries_again(server, endpoint):
    server.replies[:] = [(429, {"Retry-After": "3"}), 503, (429, {"Retry-After": "Mon"}), "fine"]
    assert endpoint.ask([]) == "fine" and endpoint.waits == [3, 2, 4]
    server.replies[:] = [500]
    with pytest.raises(InputError, match="gave no answer in 6 attempts .the last: 500.*again to go on"):
        endpoint.ask([])
    assert len(server.seen) == 4 + ATTEMPTS


def test_no_server_and_no_answer_in_time(server, endpoint, monkeypatch):
    monkeypatch.setattr("experiments.judge.endpoint.ATTEMPTS", 2)
    with pytest.raises(InputError, match="gave no answer in 2 attempts"):
        judge.Endpoint("http://127.0.0.1:9", "m", None, sleep=lambda s: None).ask([])
    with pytest.raises(InputError, match="is no address of an endpoint"):
        judge.Endpoint("file:///etc", "m", None)


@pytest.mark.parametrize(
    "reply, words",
    [
        (401, "refuses the key .401"),
        (404, "does not take the request .404.*--url and --model"),
        ((302, {"Location": "http://127.0.0.1:9/"}), "does not take the request .302"),
        (b"<html>", "not as an OpenAI-compatible endpoint: '<html>'"),
        (b"{}", "not as an OpenAI"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, endpoint, reply, words):
    server.replies[:] = [reply]
    with pytest.raises(InputError, match=words):
        endpoint.ask([])
    assert len(server.seen) == 1


def test_goes_on_where_it_stopped(tmp_path, server, endpoint):
    rows, pictures = _captions(tmp_path)
    out = tmp_path / "out.jsonl"
    server.replies[:] = [GOOD, 401]
    with pytest.raises(InputError, match="refuses"):
        judge.judge(rows, pictures, "describe", endpoint, out, _quiet())
    whole = out.read_text()
    assert whole.count("\n") == 1
    out.write_text(whole + '{"stack": "[prunehal]", "ima')  # killed while it wrote
    server.replies[:] = ["no\u2028idea", GOOD]
    found = judge.judge(rows, pictures, "describe", endpoint, out, _quiet())
    assert len(server.seen) == 4 and out.read_text().startswith(whole) and out.read_text().count("\n") == 3
    assert [found[judge.key(row)]["ratings"] for row in rows] == [
        {"correctness": 7, "detailedness": 5.5},
        None,
        {"correctness": 7, "detailedness": 5.5},
    ]
    assert found[judge.key(rows[1])]["reply"] == "no\u2028idea"
    score = judge.summary(rows, found, "describe")["[prunehal]"]
    assert (score["n"], score["unclear"], score["correctness"]) == (2, 1, {"value": 7, "low": 7, "high": 7})
    judge.judge(rows, pictures, "describe", endpoint, out, _quiet())
    judge.judge([rows[0] | {"caption": "Another."}], pictures, "describe", endpoint, out, _quiet())
    assert len(server.seen) == 5  # nothing for what is rated, one for what was said anew
    with pytest.raises(InputError, match="holds ratings of 'describe' by 'judge-1', not of 'mmvet'"):
        judge.judge(rows, {}, "mmvet", endpoint, out, _quiet())
    out.write_text("{\n")
    with pytest.raises(InputError, match="line 1, is no JSON"):
        judge.judge(rows, pictures, "describe", endpoint, out, _quiet())


def test_mmhal_needs_no_picture_and_counts_hallucinations(tmp_path, server, endpoint):
    rows = [
        {
            "stack": "[]",
            "image": str(n),
            "caption": f"Two cats {n}.",
            "question": "How many?",
            "gt_answer": "One.",
            "image_content": ["Cat", "Mat"],
        }
        for n in range(4)
    ]
    server.replies[:] = ["rating: 6", "rating: 2", "Rating: 3", "rating: 1"]
    found = judge.judge(rows, {}, "mmhal", endpoint, tmp_path / "out.jsonl", _quiet())
    (content,) = server.seen[0][2]["messages"][0]["content"]
    assert "Cat, Mat" in content["text"] and "One." in content["text"]
    score = judge.summary(rows, found, "mmhal")["[]"]
    assert (score["rating"]["value"], score["hallucinated_percent"]["value"]) == (3, 50)  # 12 of 4; two below 3
    with pytest.raises(InputError, match="the answer to '9' lacks image_content"):
        judge.judge(
            [{key: v for key, v in rows[0].items() if key != "image_content"} | {"image": "9"}],
            {},
            "mmhal",
            endpoint,
            tmp_path / "out.jsonl",
            _quiet(),
        )


def _run(tmp_path, server, *more):
    return main(
        [
            str(tmp_path / "captions.jsonl"),
            "--url",
            server.url,
            "--model",
            "judge-1",
            "--out",
            str(tmp_path / "out.jsonl"),
            *more,
        ]
    )


def test_command(tmp_path, server, monkeypatch, capsys):
    _captions(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert _run(tmp_path, server) == 2 and "OPENAI_API_KEY is not set" in " ".join(capsys.readouterr().err.split())
    assert _run(tmp_path, server, "--key-env", "none") == 2 and "--images" in capsys.readouterr().err
    assert (
        _run(tmp_path, server, "--key-env", "none", "--task", "typcal") == 2
        and "Did you mean 'typical'" in capsys.readouterr().err
    )
    monkeypatch.setenv("MINE", "k")
    assert _run(tmp_path, server, "--key-env", "MINE", "--images", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "[prunehal]" in out and "7.00 to 7.00" in out and server.seen[0][1] == "Bearer k"
    (tmp_path / "0.png").unlink()
    assert _run(
        tmp_path, server, "--key-env", "MINE", "--images", str(tmp_path)
    ) == 2 and "1 of 3 pictures are missing" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "captions.jsonl").write_text('{"image": 1, "caption": null}\n')
    assert _run(tmp_path, server, "--key-env", "MINE") == 2 and "a caption that is no text" in " ".join(
        capsys.readouterr().err.split()
    )
    (tmp_path / "captions.jsonl").write_text('{"image": 1}\n')
    assert _run(tmp_path, server, "--key-env", "MINE") == 2 and "lacks caption" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_task_gives_pictures_and_what_rows_lack(tmp_path, server):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "v1_0", "caption": "Five."}) + "\n")
    (tmp_path / "mm-vet.json").write_text(
        json.dumps({"v1_0": {"imagename": "v1_0.png", "question": "How many?", "answer": "5<OR>five"}})
    )
    Image.new("RGB", (2, 2)).save(tmp_path / "v1_0.png")
    server.replies[:] = ["correctness: 1.0"]
    assert (
        _run(
            tmp_path,
            server,
            "--key-env",
            "none",
            "--bench",
            "mmvet",
            "--task",
            "mmvet",
            "--set",
            f"file={tmp_path}/mm-vet.json",
            f"images={tmp_path}",
        )
        == 0
    )
    assert "5 <OR> five" in server.seen[0][2]["messages"][0]["content"][0]["text"]
