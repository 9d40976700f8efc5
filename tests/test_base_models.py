"""Facts about the analysis of base models."""

import http.server
import json
import threading

import pytest

from eval import score_rows
from findings.base_models import (
    REFLECTION,
    analyse,
    analysis_table,
    judge,
    plot_analysis,
    reflects,
)
from templates import last_boxed
from tests.helpers import boxed


def test_self_reflection_is_a_word_of_the_papers_list():
    assert len(REFLECTION) == 15 and all(reflects(f"Let me {word.title()}.") for word in REFLECTION)
    assert not reflects("Wait, checking the steps: 2") and not reflects("")


def rows_of(groups):
    """The rows that eval.py writes of groups of (response, correct)."""
    return [
        {"response": text, "correct": bool(correct)} for group in groups for text, correct in group
    ]


def test_an_analysis_is_that_of_a_count_by_hand():
    right, wrong = boxed("0.5"), boxed("3")
    scores = analyse(
        rows_of(
            [
                [(right, 1), (right, 1), (wrong, 0), ("wait, let me recheck. " + right, 1)],
                [(wrong, 0), ("no box", 0), ("<answer> 2 </answer>", 0), (wrong, 0)],
                [(wrong, 0), ("Let me Double-Check: " + right, 1), (wrong, 0), ("\\boxed{1", 0)],
            ]
        ),
        4,
    )
    assert scores["answered"] == 10 / 12
    assert (scores["reflection"], scores["reflection_of_questions"]) == (2 / 12, 2 / 3)
    assert scores["accuracy_reflecting"] == 1
    assert scores["accuracy_not_reflecting"] == pytest.approx(2 / 10)
    assert analyse(rows_of([[(right, 1)]]), 1)["accuracy_reflecting"] is None


def test_an_analysis_is_a_table_and_a_figure(grader, tmp_path):
    results = []
    for template, text in (("none", "no box"), ("r1", "I recheck: " + boxed("0.5"))):
        rows = [
            row
            | {"length": 3, "finish_reason": "stop", "answer": last_boxed(row["response"])}
            | {"reward": float(row["correct"]), "failure": None}
            for row in rows_of([[(text, text != "no box"), (boxed("7"), False)]] * 3)
        ]
        scores = score_rows(rows, 2, grader) | analyse(rows, 2)
        results.append({"model": "a/b", "template": template, "task": "t"} | scores)
    head, _, none, r1 = analysis_table(results, 2).splitlines()
    cells = [dict(zip(head.split(" | "), line.split(" | "))) for line in (none, r1)]
    assert [c["answers"] for c in cells] == ["0.500", "1.000"]
    assert [c["pass@2"] for c in cells] == ["0.000", "1.000"]
    assert [c["accuracy with"] for c in cells] == ["", "1.000"]
    assert [c["reflects: questions"] for c in cells] == ["0.000", "1.000"]
    plot_analysis(results, 2, tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").stat().st_size > 10_000


class FakeJudge(http.server.BaseHTTPRequestHandler):
    """Says 2 of a response with "hm", fails at one with "error", else says 1."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][0]["content"]
        reply = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": "2" if "hm" in asked else "1"},
                    }
                ],
            }
        ).encode()
        self.send_response(400 if "error" in asked else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def test_a_judge_is_asked_over_http_and_may_fail():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = [{"prompt": "1+1", "response": r} for r in ("2", "hm, 2", "hm, I recheck", "error {0}")]
    try:
        shares = judge(rows, f"http://127.0.0.1:{server.server_port}/v1", "small")
    finally:
        server.shutdown()
        server.server_close()
    assert shares == {
        "judge_answers": 0.75,
        "judge_reflects": 0.5,
        "judge_and_words": 0.25,
        "judge_silent": 0.25,
    }
