"""The only rooms that know auto_LiRPA from inside."""
