#!/usr/bin/env python3
"""Share something that answers prompts: the ten-line provider, ready to paste.

    python3 server-example.py [NAME [KEY]]

`python3 neuroengine.py register NAME` prints the key. The environment variables
NEUROENGINE_SERVICE and NEUROENGINE_KEY can take the place of the arguments.
NEUROENGINE_SERVER, a host name or a URL, is the relay.
"""

import os
import sys

from neuroengine import NeuroengineError
from neuroengine import NeuroengineServer

if "--help" in sys.argv:
    print(__doc__.strip())
    sys.exit()

service = "MYGPT"                      # your service's name
service_key = "SERVICE-KEY"            # your service's key


def answer(request):
    print("Asked:", request["message"], flush=True)
    yield "This is the LLM. You said: "    # ask your LLM here; each text that you
    yield request["message"]               # yield is sent at once


service = os.environ.get("NEUROENGINE_SERVICE", service)
service_key = os.environ.get("NEUROENGINE_KEY", service_key)
if len(sys.argv) > 1:
    service = sys.argv[1]
if len(sys.argv) > 2:
    service_key = sys.argv[2]

server = NeuroengineServer()
if server.login(service, service_key) < 0:
    print("Cannot log in:", server.error)
    sys.exit(1)
print("Logged in! Sharing %s; Ctrl-C stops." % service, flush=True)
try:
    server.listen(answer)
except NeuroengineError as error:      # the key was replaced, or the service deleted
    sys.exit("Stopped sharing: %s" % error)
