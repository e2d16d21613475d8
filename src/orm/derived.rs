//! What derived code calls.
