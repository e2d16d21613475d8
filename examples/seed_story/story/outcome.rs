//! The outcome of a suite.

use std::time::Duration;

pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) worked: usize,
    pub(crate) failure: Option<Failure>,
    /// The most sessions on the server at one time.
    pub(crate) most: usize,
    pub(crate) opened: Option<usize>,
    pub(crate) left: usize,
    /// The time of the applications that worked.
    pub(crate) spent: Duration,
}

pub(crate) struct Failure {
    pub(crate) number: usize,
    pub(crate) after: Duration,
}

impl Outcome {
    pub(crate) const HEADER: [&str; 8] =
        ["", "worked", "failed at", "most at once", "opened", "left", "per app", "waited to fail"];

    pub(crate) fn cells(&self) -> [String; 8] {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let failure = self.failure.as_ref();
        [
            self.name.into(),
            self.worked.to_string(),
            or_dash(failure.map(|failure| format!("app {}", failure.number))),
            self.most.to_string(),
            or_dash(self.opened.map(|opened| opened.to_string())),
            self.left.to_string(),
            or_dash(self.per_app().map(|time| format!("{:.0} ms", time.as_secs_f64() * 1000.0))),
            or_dash(failure.map(|failure| format!("{:.1} s", failure.after.as_secs_f64()))),
        ]
    }

    /// The outcome in words, to follow a name.
    pub(crate) fn verdict(&self) -> String {
        match &self.failure {
            Some(failure) => format!("failed at app {}", failure.number),
            None => format!("ran all {} and left {}", self.worked, self.left),
        }
    }

    /// The application at which the suite would fail, if it has not failed but has left sessions.
    pub(crate) fn would_fail_at(&self, slots: usize) -> Option<usize> {
        (self.failure.is_none() && self.left > 0).then(|| slots * self.worked / self.left + 1)
    }

    fn per_app(&self) -> Option<Duration> {
        self.spent.checked_div(u32::try_from(self.worked).ok()?)
    }
}
