"""The error tree: every message says what happened and what to do next."""


class PgmcpError(Exception):
    """Root of everything that pgmcp raises on purpose."""


class SettingsError(PgmcpError):
    """A setting has a value that cannot work."""


class TargetError(PgmcpError):
    """The served target cannot be imported or is no MCP server.

    Args:
        message: one line.
        trace: the part of the trace that is the user's own; empty where none of their code ran.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class PortTaken(PgmcpError):
    """Somebody else listens on the port."""


class LifespanFailed(PgmcpError):
    """The served server's own start, its lifespan, raised an error."""


class SchemaError(PgmcpError):
    """The database's schema is not one that this build understands."""


class RightsMissing(SchemaError):
    """The role that connects may not do what nodes do; `pgmcp db grants` prints what it needs."""


class SchemaInUse(SchemaError):
    """Living nodes could not work with what a migration would leave; the steps before it were taken."""


class OtherServer(PgmcpError):
    """The cluster in this schema serves another server than this node; it did not join."""


class EmbeddedError(PgmcpError):
    """The embedded PostgreSQL cannot be found, set up or started."""


class DatabaseUnavailable(PgmcpError):
    """The database did not answer within the time that the caller may wait."""


class SchemaGone(DatabaseUnavailable, SchemaError):
    """The database answers, but the tables are not there: dropped, or being restored. Waited for as in an outage."""


class LoginRefused(DatabaseUnavailable):
    """The database answers, and will go on refusing this login until somebody changes something."""


class NodeNotReady(PgmcpError):
    """This node cannot act now: it is joining, suspended, fenced or leaving."""


class NodeUnknown(PgmcpError):
    """No living node has this name or id."""


class SessionUnknown(PgmcpError):
    """No live session has this id, or it belongs to somebody else."""


class DuplicateRequest(PgmcpError):
    """The session has an unfinished request with this id and another body."""


class ClusterFull(PgmcpError):
    """The cluster has as many sessions as it may have."""


class NodeFull(PgmcpError):
    """This node has as many exchanges open as it may have."""


class TooManySessions(PgmcpError):
    """One caller has as many sessions as it may have."""


class SessionBusy(PgmcpError):
    """A session has as many requests in flight, or streams open, as it may have."""


class StreamTaken(PgmcpError):
    """Several connections take one stream from each other; it stays with the one that has it."""


class Fenced(PgmcpError):
    """A write came from an ownership that is over; nothing was stored."""


class OutOfStep(PgmcpError):
    """A write does not fit to what the tables hold, though its ownership may well hold; nothing was stored."""


class StateRefused(PgmcpError):
    """A value cannot be kept for a session: too large, too many, or no JSON."""


class MessageTooLarge(PgmcpError):
    """The server's code wants to send more in one message than a client may be sent."""


class PublicationRefused(PgmcpError):
    """What was to be published is no event that clients know, or names its resource in a way that cannot be stored."""


class NoSession(PgmcpError):
    """Session state was asked for outside of a session's handlers."""


def unknown(error: BaseException) -> bool:
    """Whether nobody raised it on purpose: then its text may quote anything."""
    return not isinstance(error, PgmcpError)


def told(error: BaseException) -> str:
    """What a log line says of an error: our own text, or only the kind of one that nobody expected."""
    return type(error).__name__ if unknown(error) else str(error)
