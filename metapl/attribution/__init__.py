"""What each training example did: a training as a record, its replays, and scores by them."""
