"""An OpenAI-compatible server around one resident decoder, with a playground.

The data flow: ``app`` takes a request and ``schemas`` checks it; ``completions`` or ``chat`` turns it into ``Work``;
``fair`` keeps it in line; the one worker thread of ``engine`` runs it, with what ``prefixes`` remembers and ``text``
makes of the tokens; a ``Mailbox`` brings the events back, and ``answers`` sends them.
"""
