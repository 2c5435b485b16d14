#!/usr/bin/env python3
"""Print a poem while it is being written.

    python3 streaming-example.py [NAME]

NAME is the service to ask. NEUROENGINE_SERVER, a host name or a URL, is the relay.
"""

import secrets
import sys

from neuroengine import Neuroengine

if "--help" in sys.argv:
    print(__doc__.strip())
    sys.exit()

service_name = sys.argv[1] if len(sys.argv) > 1 else "MYGPT"
api = Neuroengine(service_name=service_name)

streamkey = secrets.token_hex(16)      # a new random one for each prompt
while True:
    text = api.request("Write a poem", streamkey=streamkey, gettokens=5,
                       max_new_len=1000)
    if text == "":                     # the poem has ended
        break
    if text.errorcode:                 # what went wrong, in words
        sys.exit(text)
    print(text, end="", flush=True)
print()
