//! Catching panics. Some of the program's code must not decide the fate of the library's own state: it runs inside
//! `catch_unwind`.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::wording::log_line;

/// Runs `run`. A panic is logged, and the result is `None`. `source` names the code in the log line.
pub(crate) fn catch_panic<T>(source: &str, run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(value) => Some(value),
        Err(panic) => {
            // Outside of the log macro: the panic value has to be dropped even if logging is off.
            let message = into_panic_message(panic);
            log_line!(warn, "diesel_session::session", "{source} panicked: {message}");
            None
        }
    }
}

/// Drops a value whose `Drop` may be the program's own code. A panic of this `Drop` is logged.
///
/// Each value is dropped separately: if two values of one collection panic while the collection is dropped, the process
/// aborts.
pub(crate) fn drop_catching_panic<T>(value: T) {
    if std::mem::needs_drop::<T>() {
        catch_panic("a value of the program, when it was dropped,", || drop(value));
    }
}

/// Drops every value of a collection with [`drop_catching_panic`].
pub(crate) fn drop_each_catching_panics<T>(values: impl IntoIterator<Item = T>) {
    values.into_iter().for_each(drop_catching_panic);
}

/// The text of an error whose `Display` may be the program's own code.
pub(crate) fn display_catching_panic(error: &dyn Display) -> String {
    catch_panic("the `Display` of an error", || format!("{error:#}"))
        .unwrap_or_else(|| "an error whose `Display` panicked".into())
}

/// The message of a caught panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

/// The message of a caught panic, whose value is dropped. A panic of this drop is caught too.
pub(crate) fn into_panic_message(panic: Box<dyn Any + Send>) -> String {
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
    fn drop_each_catching_panics_catches_several_panics() {
        drop_each_catching_panics([Bomb, Bomb]);
    }

    #[test]
    fn display_catching_panic_names_the_panic() {
        let bomb = std::mem::ManuallyDrop::new(Bomb);
        assert!(display_catching_panic(&*bomb).contains("`Display` panicked"));
    }

    #[test]
    fn catch_panic_survives_a_panic_value_that_panics_when_dropped() {
        assert_eq!(catch_panic("it", || std::panic::panic_any(Bomb)), None::<()>);
    }

    #[test]
    fn drop_each_catching_panics_works_while_the_thread_unwinds() {
        struct AtTheEnd;

        impl Drop for AtTheEnd {
            fn drop(&mut self) {
                drop_each_catching_panics([Bomb, Bomb]);
            }
        }

        let unwound = catch_unwind(|| {
            let _end = AtTheEnd;
            panic!("first");
        });
        assert_eq!(unwound.map_err(into_panic_message), Err("first".to_owned()));
    }
}
