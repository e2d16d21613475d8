//! The form that a visitor sends, and its validation.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;

use crate::entry::NewEntry;
use crate::request::Request;

pub(crate) const AUTHOR_LENGTH: usize = 100;
pub(crate) const MESSAGE_LENGTH: usize = 2000;

/// The fields of the request. The page shows them again if they are invalid.
#[derive(Default)]
pub(crate) struct Form {
    pub(crate) author: String,
    pub(crate) message: String,
}

/// The problem of each field.
#[derive(Default)]
pub(crate) struct Problems {
    pub(crate) author: Option<String>,
    pub(crate) message: Option<String>,
}

/// The reason for the refusal of a whole request, for example if its body is no form.
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) reason: &'static str,
}

impl Form {
    /// Reads the form in the body of a request.
    pub(crate) fn read(request: &Request) -> Result<Self, Refusal> {
        let refuse = |status, reason| Err(Refusal { status, reason });
        let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.to_ascii_lowercase().starts_with("application/x-www-form-urlencoded") {
            return refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The entry has to come as application/x-www-form-urlencoded.",
            );
        }
        let body = match request.body() {
            Ok(body) => body,
            Err(error) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                return refuse(error.status(), "That is too long for a guestbook.");
            }
            Err(_) => return refuse(StatusCode::BAD_REQUEST, "The form did not arrive whole."),
        };
        let mut form = Self::default();
        for (name, value) in form_urlencoded::parse(body) {
            match &*name {
                "author" => form.author = cleaned(&value),
                "message" => form.message = cleaned(&value),
                _ => {}
            }
        }
        Ok(form)
    }

    /// Validates the form and returns the new entry.
    pub(crate) fn check(&self) -> Result<NewEntry, Problems> {
        let problems = Problems {
            author: problem(&self.author, AUTHOR_LENGTH, "Please tell us your name."),
            message: problem(&self.message, MESSAGE_LENGTH, "Please write a message."),
        };
        if problems.author.is_some() || problems.message.is_some() {
            return Err(problems);
        }
        Ok(NewEntry { author: self.author.clone(), message: self.message.clone() })
    }
}

/// Removes control characters: PostgreSQL stores no NUL, and browsers end a line with CR LF.
fn cleaned(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    text.trim().to_owned()
}

fn problem(text: &str, longest: usize, missing: &str) -> Option<String> {
    match text.chars().count() {
        0 => Some(missing.to_owned()),
        length if length > longest => Some(format!("At most {longest} characters, please; these are {length}.")),
        _ => None,
    }
}
