"""What is known of a model while it trains: its session, its schedule, the roles of its tokens."""
