use std::thread;
use std::time::{Duration, Instant};

/// Asks every 2 ms until the answer is yes; false when it never was within `limit`.
pub fn until(limit: Duration, mut answer: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if answer() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Measures every 2 ms until it is `wanted` or `limit` is over; the last measurement.
pub fn until_equal<T: PartialEq>(wanted: T, limit: Duration, mut measure: impl FnMut() -> T) -> T {
    let mut last = measure();
    until(limit, || {
        if last != wanted {
            last = measure();
        }
        last == wanted
    });
    last
}
