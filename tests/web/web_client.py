"""Clients of the page's API, and what they are answered."""

from __future__ import annotations

import time
import warnings

from retouch.web.serve import app

with warnings.catch_warnings():  # starlette asks anyio by an old name
    warnings.simplefilter("ignore", DeprecationWarning)
    from fastapi.testclient import TestClient

__all__ = ["HOST", "TOKEN", "TestClient", "client_of", "done", "ended", "refused", "wait"]

HOST = "http://127.0.0.1:8412"
TOKEN = "t" * 32


def client_of(bench, **more):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(app(bench, TOKEN), base_url=HOST, headers=headers, raise_server_exceptions=False, **more)


def wait(client):
    """The work that is going on, at its end."""
    for _ in range(2000):
        job = client.get("/api/job").json()
        if job["state"] != "running":
            return job
        time.sleep(0.005)
    raise AssertionError(job)


def ended(client, name, body):
    """The work that a request begins, at its end."""
    begun = client.post(f"/api/{name}", json=body)
    assert begun.status_code == 202, begun.json()
    return wait(client)


def done(client, name, body):
    job = ended(client, name, body)
    assert job["state"] == "done", job
    return job["result"]


def refused(answer, status=422):
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]
