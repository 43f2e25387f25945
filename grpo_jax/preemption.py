"""The notice that a machine of Google's is being taken away, as its metadata server gives it.

Its init system sends SIGTERM too, but not into every container, nor before services that it stops first; and of the 30
seconds that are left each one counts. https://cloud.google.com/compute/docs/instances/create-use-spot ("Detect
preemption"), https://cloud.google.com/compute/docs/metadata/querying-metadata (waiting for a change).
"""

import contextlib
import functools
import http.client
import logging
import os
import pathlib
import threading
import time
import urllib.error
import urllib.request

__all__ = ["notice"]

_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")  # where Google's libraries look too
_WAIT, _PAUSE = 300, 1  # seconds that the server may wait for a change, and that we do between two questions


@functools.cache
def notice() -> threading.Event:
    """Is set once this machine's notice is there, which a thread waits for; the same one whenever it is asked for.

    Nobody is asked where the machine is not Google's, or where `NO_GCE_CHECK=true`. `GCE_METADATA_HOST=HOST:PORT` names
    another server than metadata.google.internal, for a machine of any kind. Both are as Google's libraries have them.
    """
    came, host = threading.Event(), os.environ.get("GCE_METADATA_HOST")
    if host is None:
        with contextlib.suppress(OSError):
            host = "metadata.google.internal" if _PRODUCT.read_text().startswith("Google") else None
    if host is not None and os.environ.get("NO_GCE_CHECK", "").lower() != "true":
        threading.Thread(target=_wait, args=(host, came), name="preemption", daemon=True).start()
    return came


def _wait(host: str, came: threading.Event) -> None:
    """Sets `came` when the server says so; returns without where it has no such word to say."""
    etag, direct = "0", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    log, failed = logging.getLogger(__name__), False
    while True:
        asked = f"wait_for_change=true&last_etag={etag}&timeout_sec={_WAIT}"
        url = f"http://{host}/computeMetadata/v1/instance/preempted?{asked}"
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with direct.open(request, timeout=_WAIT + 30) as answer:
                etag, said = answer.headers.get("ETag", "0"), answer.read().strip()
        except urllib.error.HTTPError as error:
            problem = error
            if error.code == 404:  # not every server that stands in for it knows of preemption
                return log.warning("%s does not tell of preemption: of it SIGTERM alone will be heard.", host)
        except (OSError, http.client.HTTPException) as error:  # it may be gone for a while
            problem = error
        else:
            problem = None
            if said == b"TRUE":
                log.warning("%s says that this machine is being taken away.", host)
                return came.set()
        if problem is not None and not failed:
            log.warning("%s cannot be asked about preemption, and will be again: %s", host, problem)
        failed = problem is not None
        time.sleep(_PAUSE)
