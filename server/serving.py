"""One message through a ClientApp: whatever it raises becomes an error reply that says so in one line."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from logging import DEBUG

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore import log


def serve(app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """The ClientApp's reply or an error reply; after an error `context.state` may be half changed: drop it."""
    try:
        reply = app(message, context)
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise TypeError(
                "the ClientApp returned no reply to this message; return Message(content, reply_to=message)"
            )
        return reply
    except BaseException as error:  # also SystemExit: an app that calls sys.exit has failed, its process has not
        log(DEBUG, "ClientApp raised on %s\n%s", message.metadata.message_id, traceback.format_exc())
        return error_reply(message, error)


def error_reply(message: Message, error: BaseException) -> Message:
    """The reply of a client that raised."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, one_line(error)), reply_to=message)


def one_line(error: BaseException) -> str:
    """An exception's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
