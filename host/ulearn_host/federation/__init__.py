"""A fleet that learns together in rounds: jobs, their state machine, links to the boards, and its simulation."""
