"""What commands put together of the other rooms, by the options of a config."""
