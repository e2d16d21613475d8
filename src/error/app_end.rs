//! What ended an application, or its pool.

/// What has happened to an application that gives no connection: see [`Error::Disposed`](crate::Error::Disposed).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AppEnd {
    /// Its pool was closed by a [`dispose`](crate::App::dispose) while the caller asked for a connection. It opens another pool at its
    /// next use.
    Disposed,
    /// [`Database::remove_app`](crate::Database::remove_app) has ended it.
    Removed,
    /// It was the application of a test that has ended.
    TestEnded,
}

impl AppEnd {
    /// Sentences on an application, after its name.
    pub(super) fn description(self) -> &'static str {
        match self {
            Self::Disposed => {
                "was disposed of while the caller asked for a connection. Try again: it opens a fresh pool at its next use."
            }
            Self::Removed => "was removed by `remove_app`. Register it anew with `init_app`.",
            Self::TestEnded => "has ended with its test. Let what uses it end before the test does.",
        }
    }
}
