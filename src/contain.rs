//! Code of the program that must not decide what becomes of the library's own state: it runs inside of `catch_unwind`.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::panic::panic_message;
use crate::wording::log_line;

/// Runs `run`. A panic is logged and gives `None`.
pub(crate) fn contained<T>(what: &str, run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(value) => Some(value),
        Err(panic) => {
            // The log may be off, and the value of the panic is dropped all the same.
            let message = message_of(panic);
            log_line!(warn, "diesel_session::session", "{what} panicked: {message}");
            None
        }
    }
}

/// Drops a value whose `Drop` may be the program's own. A panic of it is logged.
///
/// Values are dropped one by one: if two values of one collection panic while it is dropped, the process aborts.
pub(crate) fn drop_contained<T>(value: T) {
    if std::mem::needs_drop::<T>() {
        contained("a value of the program, when it was dropped,", || drop(value));
    }
}

/// The same for each value of a collection.
pub(crate) fn drop_each<T>(values: impl IntoIterator<Item = T>) {
    values.into_iter().for_each(drop_contained);
}

/// The text of an error whose `Display` may be the program's own.
pub(crate) fn text_of(error: &dyn Display) -> String {
    contained("the `Display` of an error", || error.to_string())
        .unwrap_or_else(|| "an error whose `Display` panicked".into())
}

/// The message of a panic. Its value is dropped here, which may panic as well.
pub(crate) fn message_of(panic: Box<dyn Any + Send>) -> String {
    let message = panic_message(&*panic);
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(second);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    impl Display for Bomb {
        fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            panic!("shown");
        }
    }

    #[test]
    fn several_panics_of_drops_are_contained() {
        drop_each([Bomb, Bomb]);
        let bomb = std::mem::ManuallyDrop::new(Bomb);
        assert!(text_of(&*bomb).contains("`Display` panicked"));
    }

    #[test]
    fn panic_value_that_panics_when_dropped_is_contained() {
        assert_eq!(contained("it", || std::panic::panic_any(Bomb)), None::<()>);
    }

    #[test]
    fn drops_are_contained_while_the_thread_unwinds() {
        struct AtTheEnd;

        impl Drop for AtTheEnd {
            fn drop(&mut self) {
                drop_each([Bomb, Bomb]);
            }
        }

        let unwound = catch_unwind(|| {
            let _end = AtTheEnd;
            panic!("first");
        });
        assert_eq!(unwound.map_err(message_of), Err("first".to_owned()));
    }
}
