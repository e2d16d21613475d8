//! The reason why an application or its pool is closed.

/// The reason why an application gives no connection; see [`ErrorKind::Disposed`](crate::ErrorKind::Disposed).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AppEnd {
    /// A [`dispose`](crate::App::dispose) has closed the pool during the checkout. The application opens another pool
    /// at its next use.
    Disposed,
    /// [`Database::remove_app`](crate::Database::remove_app) has removed the application.
    Removed,
    /// [`Database::shutdown`](crate::Database::shutdown) has ended all applications of the database object.
    ShutDown,
    /// The application belonged to a test that has ended.
    TestEnded,
}

impl AppEnd {
    /// The end of a text that begins with the application's name.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::Disposed => {
                "was disposed of while the caller asked for a connection. Try again: it opens a fresh pool at its next use."
            }
            Self::Removed => "was removed by `remove_app`. Register it again with `init_app`.",
            Self::ShutDown => {
                "was ended by `Database::shutdown`. The database object gives no connection from then on."
            }
            Self::TestEnded => "has ended with its test. Let what uses it end before the test does.",
        }
    }
}
