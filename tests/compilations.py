"""What JAX traces and compiles while something runs, and what is in a compiled program."""

import re

import jax


class Compilations(list):
    """Everything that JAX traces or compiles while this is open, by name."""

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.hear)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self.hear)

    def hear(self, event, duration, **said):
        if event.startswith("/jax/core/compile/"):
            self.append(f"{event.rpartition('/')[2]} of {said.get('fun_name')}")


def asks_the_host(text: str) -> bool:
    """Whether a compiled program waits for the host, or has something for it, before it ends."""
    return re.search(r"callback| (infeed|outfeed|send|recv)(-done)?\(", text) is not None
