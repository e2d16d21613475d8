use std::time::Duration;

use serde_json::Value;
use ureq::{Agent, Body, Error, http::Response};

/// An HTTP client with connections of its own, which answers for nothing: no redirect is followed, no status is an
/// error.
pub(crate) fn agent() -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .timeout_global(Some(Duration::from_secs(60)));
    config.build().into()
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    /// The outcome of a request; without an answer there is a text in its place, and the status is 0.
    pub(crate) fn of(outcome: Result<Response<Body>, Error>) -> Answer {
        let read = outcome.and_then(|mut response| {
            Ok(Answer { status: response.status().as_u16(), body: response.body_mut().read_to_string()? })
        });
        read.unwrap_or_else(|error| Answer { status: 0, body: format!("no answer: {error}") })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
