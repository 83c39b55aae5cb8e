import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from ping_llm import MeasurementTable
from ping_llm.prediction.predictor import LEVELS
from ping_llm.serve import engine, guard
from ping_llm.serve.app import PAGE, Service, create_app
from ping_llm.serve.places import Place, Places

PAIR = {"src": "10.0.0.1", "dst": "10.0.1.2"}
HISTORY = [
    {"src": "10.9.9.9", "dst": "10.0.1.2", "rtt_ms": 3.0},
    {"src": "10.9.9.9", "dst": "10.0.1.3", "rtt_ms": 4.0},
]


def table(rows, *, measured=False):
    columns = {
        "src_addr": [row["src"] for row in rows],
        "dst_addr": [row["dst"] for row in rows],
        "event_time": [row.get("time") for row in rows],
    }
    if measured:
        columns["rtt"] = [row["rtt_ms"] for row in rows]
    return pa.table(columns)


def numbers(answer):
    return [*answer["rtt_ms"].values(), answer["p_failed"]]


def expected(predictor, rows, history=None):
    """Returns what the library says of pairs, as `numbers` of each answer [n, 8]."""
    history = None if history is None else table(history, measured=True)
    answers = predictor.predict(table(rows), history=history)
    names = [*(f"rtt_{name}" for name in (*LEVELS, "mode", "mean")), "p_failed"]
    return np.stack([answers[name].to_numpy() for name in names], axis=1)


def test_answers_asked_all_at_once_are_those_of_the_library(client, predictor):
    pairs = [
        {"src": f"10.0.{i % 2}.{i % 4}", "dst": f"10.0.1.{i % 6 or 250}", "time": t}
        for i in range(25)
        for t in (None, 1_700_001_500)
    ]
    requests = [pairs[0:1], pairs[1:30], pairs[30:33], *([pair] for pair in pairs[33:])]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(
            pool.map(lambda asked: client.post("/predict", json={"pairs": asked}), requests)
        )
    for asked, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = np.array([numbers(each) for each in answer.json()["answers"]])
        np.testing.assert_allclose(found, expected(predictor, asked), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("times", [(None, None), (1_700_000_500, 1_700_000_900)])
def test_a_history_counts_for_who_brings_it_alone(client, predictor, times):
    pairs = [{"src": "10.9.9.9", "dst": "10.0.1.4", "time": times[1]}, PAIR]
    history = [{**each, "time": times[0]} for each in HISTORY]
    asked = {"pairs": pairs, "history": history}
    with_it = client.post("/predict", json=asked).json()["answers"]
    without = client.post("/predict", json={"pairs": pairs}).json()["answers"]
    assert [each["unseen"] for each in with_it] == [[], []]
    assert [each["unseen"] for each in without] == [["src"], []]
    found = [numbers(each) for each in with_it]
    np.testing.assert_allclose(found, expected(predictor, pairs, history), rtol=1e-5, atol=1e-7)
    found = [numbers(each) for each in without]
    np.testing.assert_allclose(found, expected(predictor, pairs), rtol=1e-5, atol=1e-7)


def test_what_is_later_than_the_question_is_left_out_and_told(client):
    later = {**HISTORY[0], "time": 1_700_005_000}
    asked = {"pairs": [{**PAIR, "time": 1_700_000_500}], "history": [later]}
    assert client.post("/predict", json=asked).json()["answers"][0]["later"] == 1


def test_a_curve_is_99_quantiles_with_what_was_measured_beside(client, known):
    asked = {"pairs": [PAIR], "curve": True}
    answer = client.post("/predict", json=asked).json()["answers"][0]
    assert len(answer["curve_ms"]) == 99
    assert answer["curve_ms"][49] == answer["rtt_ms"]["p50"]
    assert answer["curve_ms"] == sorted(answer["curve_ms"])
    rows = (known.src == known.src[known.time.size // 4 + 6]) & (known.dst == known.dst[6])
    assert [each["rtt_ms"] for each in answer["measured"]] == known.rtt[rows].tolist()


def test_all_nodes_are_ranked_and_those_within_a_time_are_the_likely_ones(client):
    ranked = client.post("/rank", json={"src": "10.0.0.1"}).json()
    means = [each["rtt_ms"]["mean"] for each in ranked["ranked"]]
    assert ranked["nodes"] == 10
    assert len(means) == 9  # not the source itself
    assert means == sorted(means)
    limit = float(np.median([each["rtt_ms"]["p50"] for each in ranked["ranked"]]))
    asked = {"src": "10.0.0.1", "ms": limit, "probability": 0}
    near = client.post("/within", json=asked).json()
    assert near["asked"] == len(near["within"]) == 9
    chances = {each["dst"]: each["probability"] for each in near["within"]}
    assert list(chances.values()) == sorted(chances.values(), reverse=True)
    for each in ranked["ranked"]:
        within = chances[each["dst"]] / (1 - each["p_failed"])
        quantiles = [(0.05, "p5"), (0.25, "p25"), (0.5, "p50"), (0.75, "p75"), (0.95, "p95")]
        for level, name in quantiles:
            if each["rtt_ms"][name] < limit * 0.999:
                assert within >= level - 1e-6
            elif each["rtt_ms"][name] > limit * 1.001:
                assert within <= level + 1e-6
    asked["probability"] = 0.5
    some = client.post("/within", json=asked).json()["within"]
    assert [each["dst"] for each in some] == [dst for dst, p in chances.items() if p >= 0.5]


def test_scores_are_those_of_the_library(client, predictor):
    rows = [
        {**PAIR, "rtt_ms": 15.0, "time": 1_700_002_500},
        {**PAIR, "rtt_ms": -1.0, "time": 1_700_002_500},
        {"src": "10.0.0.2", "dst": "10.0.1.1", "rtt_ms": 900.0, "time": 1_700_002_500},
    ]
    scores = client.post("/score", json={"measurements": rows}).json()["scores"]
    alone = [predictor.score(table([row], measured=True))[0] for row in rows]
    np.testing.assert_allclose([each["surprise"] for each in scores], alone, rtol=1e-5)
    assert scores[1]["level"] is None
    assert scores[2]["level"] > 0.9


def test_nodes_are_placed_on_a_map_that_shows_what_is_near(client, predictor):
    for _ in range(600):
        nodes = client.get("/nodes").json()
        if nodes["map_done"]:
            break
        time.sleep(0.05)
    assert nodes["of"] == len(nodes["nodes"]) == 10
    assert all(each["x"] is not None for each in nodes["nodes"])
    assert {each["measurements"] for each in nodes["nodes"]} == {18, 12}


def test_places_are_told_of_nodes(predictor):
    place = Places({(4, bytes(10) + b"\xff\xff\x0a\0\0\0", 24): Place("Here", 1.5, -2.5)})
    service = Service(predictor, model="run", places=place)
    service.engine.close()
    assert [each and each.name for each in service.places] == [
        "Here" if text.startswith("10.0.0.") else None for text in service.texts
    ]


@pytest.mark.parametrize(
    ("path", "asked", "status", "message"),
    [
        ("/predict", {"pairs": [{"src": "10.0.0.x", "dst": "10.0.1.1"}]}, 400, "pairs, row 1: src"),
        ("/predict", {"pairs": [{"src": "10.0.0.1", "dst": "fd00::1"}]}, 400, "families"),
        ("/predict", {"pairs": [{**PAIR, "time": "soon"}]}, 400, "event_time is 'soon'"),
        ("/predict", {"pairs": []}, 422, "at least 1"),
        ("/predict", {"pairs": [PAIR] * 1001}, 422, "at most 1000"),
        ("/predict", {"pairs": [PAIR], "histroy": []}, 422, "histroy"),
        ("/predict", {"pairs": [PAIR], "history": [{**PAIR, "rtt_ms": -5}]}, 422, "rtt_ms"),
        ("/rank", {"src": "10.0.0.1", "dst": ["../../etc/passwd"]}, 400, "question, row 1: dst"),
        ("/within", {"src": "fd00::1", "ms": 5}, 400, "no other node"),
        ("/within", {"src": "10.0.0.1", "ms": 0}, 422, "greater than 0"),
    ],
)
def test_what_cannot_be_is_told_with_its_value(client, path, asked, status, message):
    answer = client.post(path, json=asked)
    assert answer.status_code == status
    assert message in answer.text
    assert "Traceback" not in answer.text


def test_a_model_that_knows_nothing_answers_from_the_history_of_the_request(predictor):
    empty = predictor.knowing(MeasurementTable.empty())
    with TestClient(create_app(Service(empty, model="x")), base_url="http://localhost") as alone:
        answer = alone.post("/predict", json={"pairs": [PAIR]})
        assert answer.status_code == 400
        assert "give a history" in answer.json()["detail"]
        asked = {"pairs": [{"src": "10.9.9.9", "dst": "10.0.1.3"}], "history": HISTORY}
        assert alone.post("/predict", json=asked).json()["answers"][0]["history"] == 1
        assert alone.post("/rank", json={"src": "10.9.9.9", "history": HISTORY}).status_code == 200
        assert alone.get("/nodes").json() == {"nodes": [], "of": 0, "map_done": True}


# --- who may ask, how much, for how long ----------------------------------------------------------


def held(predictor):
    """Returns (a service that answers when it may, whether it has something to, whether it may)."""
    service, begun, gate = Service(predictor, model="x"), threading.Event(), threading.Event()
    service.map = np.zeros((10, 2))  # no map is made beside
    answer = service.engine._answer

    def wait(parts):
        begun.set()
        gate.wait()
        return answer(parts)

    service.engine._answer = wait
    return service, begun, gate


def test_a_defect_is_told_to_who_asked_and_the_next_one_is_answered(predictor):
    service, _, gate = held(predictor)
    gate.set()
    answer, service.engine._answer = service.engine._answer, lambda parts: None
    app = create_app(service)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as alone:
        assert alone.post("/predict", json={"pairs": [PAIR]}).status_code == 500
        service.engine._answer = answer
        assert alone.post("/predict", json={"pairs": [PAIR]}).status_code == 200


def test_requests_that_find_too_many_waiting_are_refused_and_the_others_answered(
    predictor, monkeypatch
):
    monkeypatch.setattr(engine, "MOST_JOBS", 4)
    service, begun, gate = held(predictor)
    with TestClient(create_app(service), base_url="http://localhost") as alone:
        ask = lambda _: alone.post("/predict", json={"pairs": [PAIR]})  # noqa: E731
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, 0)]
            begun.wait()  # 1 is being answered, 4 of the others may wait
            asked += [pool.submit(ask, i) for i in range(11)]
            while sum(each.done() for each in asked) < 7:
                time.sleep(0.01)
            gate.set()
            answers = [each.result() for each in asked]
    assert [each.status_code for each in answers].count(429) == 7
    assert [each.status_code for each in answers].count(200) == 5
    refused = next(each for each in answers if each.status_code == 429)
    assert refused.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_given_up_and_the_next_one_comes(predictor, monkeypatch):
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.2)
    service, _, gate = held(predictor)
    with TestClient(create_app(service), base_url="http://localhost") as alone:
        late = alone.post("/predict", json={"pairs": [PAIR]})
        assert late.status_code == 503
        assert late.headers["retry-after"] == "5"
        gate.set()
        monkeypatch.setattr(guard, "ANSWER_SECONDS", 60)
        assert alone.post("/predict", json={"pairs": [PAIR]}).status_code == 200


def test_large_bodies_are_refused_whatever_they_say_of_their_size(client):
    large = b" " * (guard.MOST_BYTES + 1)
    assert client.post("/predict", content=large).status_code == 413
    parts = (b" " * 65536 for _ in range(17))  # sent in chunks, without a length
    assert client.post("/predict", content=parts).status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "a@b:1"])
def test_another_host_header_is_refused(client, host):
    assert client.get("/health", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8400", "127.0.0.1", "[::1]:8400", "LOCALHOST"])
def test_the_names_of_this_machine_are_not(client, host):
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999"])
def test_pages_of_other_servers_get_nothing(client, origin):
    answer = client.post("/predict", json={"pairs": [PAIR]}, headers={"origin": origin})
    assert answer.status_code == 403
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    answer = client.options("/predict", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers
    own = client.get("/health", headers={"origin": "http://127.0.0.1:8400"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/page/../app.py", "/%2e%2e/app.py", "//etc/passwd", "/app.py"]
)
def test_no_path_leads_out_of_the_page(client, path):
    assert client.get(path).status_code == 404


def test_every_request_must_carry_the_token(predictor):
    service = Service(predictor, model="x")
    service.map = np.zeros((10, 2))
    app = create_app(service, host="0.0.0.0", token="s3cret")
    with TestClient(app, base_url="http://any.example") as alone:
        for path in ("/", "/health", "/openapi.json", "/nowhere"):
            answer = alone.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")
        wrong = [
            "Bearer s3cre",
            "Bearer s3crett",
            "Bearer",
            "Basic !!!",
            "Basic czNjcmV0",
            "s3cret",
        ]
        for value in wrong:
            answer = alone.get("/health", headers={"authorization": value})
            assert answer.status_code == 401, value
        right = {"authorization": "Bearer s3cret"}
        assert alone.get("/health", headers=right).status_code == 200
        assert alone.get("/", auth=("me", "s3cret")).status_code == 200


def test_metrics_count_requests_by_route_and_never_by_what_was_asked(client):
    client.get("/health")
    client.get("/surely/not/there")
    text = client.get("/metrics").text
    assert 'ping_llm_requests_total{route="/health",status="200"}' in text
    assert 'ping_llm_requests_total{route="other",status="404"}' in text
    assert "surely" not in text
    assert "ping_llm_request_seconds_bucket" in text


def test_the_page_fetches_nothing_from_elsewhere(client):
    for path in ("/", *(f"/{name}" for name in PAGE[1:])):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
