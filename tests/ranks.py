"""Where ranks that a test starts one by one meet each other."""

from torch.distributed import TCPStore


class Rendezvous:
    """A store that this process holds, as torchrun's process holds that of its ranks.

    Its port is bound from the start. A port that is looked for, closed and left for rank 0 to bind may be taken by
    another process before rank 0 comes.
    """

    def __init__(self, processes: int) -> None:
        self._processes = str(processes)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun tells a rank."""
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": self._processes,
            "LOCAL_WORLD_SIZE": self._processes,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
