import jax

from grpo_jax import memory


def test_the_memory_is_what_the_container_may_have(tmp_path, monkeypatch):
    host = memory.device_memory()
    assert host > 2**20
    for name, limits in (("memory.max", [2**28]), ("memory/memory.limit_in_bytes", [2**28, 2**29])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{limits[-1]}\n")
        assert memory._container_limits(str(tmp_path)) == limits
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_limits(str(tmp_path)) == [2**29]
    monkeypatch.setattr(memory, "_container_limits", lambda: [2**28])
    assert memory.device_memory() == 2**28 // len(jax.local_devices())
