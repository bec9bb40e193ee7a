"""What can go wrong when processes are started."""


class LaunchError(Exception):
    """The processes could not be started, or not as asked."""

    is_user_error = True
