"""A small policy, a server of it in a thread, and connections by hand."""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager

import numpy as np
import torch

from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.server import PolicyServer
from flowpolicy.serving.service import PolicyService, describe

TOKEN = "correct-horse"
KEYS = {"observation": (3,), "goal": (2,)}


def make_policy(obs_horizon=2):
    torch.manual_seed(0)
    config = PolicyConfig(
        {"name": "flow_matching"}, TransformerConfig(width=16, depth=1, num_heads=2), KEYS, action_dim=2,
        obs_horizon=obs_horizon, action_horizon=4, execute_horizon=2,
    )  # fmt: skip
    policy = FlowPolicy(config).eval()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.normal_(0, 0.3)
    return policy


@contextmanager
def serving(policy, **settings):
    """A server in a thread; yields it."""
    description = describe(policy) if hasattr(policy, "schedule") else {}
    service = PolicyService(policy, max_batch=settings.get("max_batch", 64), description=description)
    server = PolicyServer(service, ServerConfig(port=0, **settings))
    with server.running():
        yield server


def observation(*batch, obs_horizon=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        key: rng.normal(size=(*batch, obs_horizon, *shape)).astype(np.float32) for key, shape in KEYS.items()
    }


def noise(*batch, seed=1):
    return np.random.default_rng(seed).normal(size=(*batch, 4, 2)).astype(np.float32)


def raw(server, data=b""):
    """A TCP connection that has sent ``data``."""
    connection = socket.create_connection(server.address, timeout=10)
    connection.sendall(data)
    return connection


def handshake(token=TOKEN, extra=""):
    return (
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Api-Key {token}\r\n{extra}\r\n"
    ).encode()


def until_closed(connection, seconds=10.0):
    """What the server sent before it closed the connection."""
    connection.settimeout(seconds)
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    connection.close()
    return received


def frame(data, opcode=2, mask=False, fin=True, claim=None):
    length = len(data) if claim is None else claim
    head = bytes([opcode | (0x80 if fin else 0)])
    flag = 0x80 if mask else 0
    if length < 126:
        head += bytes([flag | length])
    elif length < 65536:
        head += bytes([flag | 126]) + struct.pack("!H", length)
    else:
        head += bytes([flag | 127]) + struct.pack("!Q", length)
    return head + (bytes(4) + data if mask else data)  # a mask of zeros leaves the data as it is


class Changed:
    """A sampler whose ``act`` does something before."""

    def __init__(self, sampler, before):
        self.sampler, self.before = sampler, before

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def act(self, *arguments, **options):
        self.before()
        return self.sampler.act(*arguments, **options)
