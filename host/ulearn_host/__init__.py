"""ulearn's host side: prepare models, put them on boards, let a fleet learn together."""
