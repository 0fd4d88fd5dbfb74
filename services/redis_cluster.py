"""A private Redis Cluster: three masters that share the slots, no replicas."""

from __future__ import annotations

import subprocess
from pathlib import Path

from services.base import Server, free_port, require, wait_until
from services.redis import RedisServer

_NODES = 3
_SLOTS = 16_384
_OPTIONS = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--cluster-require-full-coverage", "yes")


class RedisCluster(Server):
    """``url`` names one of its nodes, from which clients learn of the others."""

    name = "redis"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # By default it is the port and 10,000, which may be none.
        self._buses = [free_port() for _ in range(_NODES)]
        self.nodes = [
            RedisServer(folder / str(number), options=(*_OPTIONS, "--cluster-port", str(bus)))
            for number, bus in enumerate(self._buses)
        ]

    @property
    def url(self) -> str:
        return f"{self.nodes[0].url}?cluster=yes"

    @property
    def pid(self) -> int:
        return self.nodes[0].pid

    def start(self) -> None:
        is_new = not self.folder.exists() or not any(self.folder.iterdir())
        for node in self.nodes:
            node.start()
        if is_new:
            self._join()
        wait_until(self._is_up, 30.0, "the cluster to agree")

    def restart(self) -> None:
        for node in self.nodes:
            wait_until(node.has_written, 20.0, "redis to write its file")
        super().restart()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def _join(self) -> None:
        for number, node in enumerate(self.nodes):
            first, end = (_SLOTS * part // _NODES for part in (number, number + 1))
            self._command(node, "ADDSLOTSRANGE", str(first), str(end - 1))
            self._command(self.nodes[0], "MEET", "127.0.0.1", str(node.port), str(self._buses[number]))

    def _is_up(self) -> bool:
        told = [self._command(node, "INFO") for node in self.nodes]
        return all("cluster_state:ok" in text and f"cluster_known_nodes:{_NODES}" in text for text in told)

    @staticmethod
    def _command(node: RedisServer, *arguments: str) -> str:
        program = require("redis-cli", "redis-tools")
        command = [program, "-p", str(node.port), "CLUSTER", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
