//! The form: what a visitor sends, before anybody has looked at it.

use std::io::Read;

use rouille::Request;
use rouille::url::form_urlencoded;

use crate::entry::NewEntry;

pub(crate) const AUTHOR_LENGTH: usize = 100;
pub(crate) const MESSAGE_LENGTH: usize = 2000;
const BODY_BYTES: usize = 64 * 1024;

/// The fields as they came, to be shown again where something is wrong with them.
#[derive(Default)]
pub(crate) struct Form {
    pub(crate) author: String,
    pub(crate) message: String,
}

/// What is wrong with each field.
#[derive(Default)]
pub(crate) struct Problems {
    pub(crate) author: Option<String>,
    pub(crate) message: Option<String>,
}

/// Why a request is refused as a whole, such as for a body that is no form at all.
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) reason: &'static str,
}

impl Form {
    /// Reads the body of a request. The session has sent nothing yet, so a slow visitor keeps no connection busy.
    pub(crate) fn read(request: &Request) -> Result<Self, Refusal> {
        let refuse = |status, reason| Err(Refusal { status, reason });
        let kind = request.header("Content-Type").unwrap_or_default();
        if !kind.to_ascii_lowercase().starts_with("application/x-www-form-urlencoded") {
            return refuse(415, "The entry has to come as application/x-www-form-urlencoded.");
        }
        let announced: Option<usize> = request.header("Content-Length").and_then(|length| length.parse().ok());
        let Some(body) = request.data() else { return refuse(400, "There is no form in this request.") };
        let mut bytes = Vec::new();
        // One byte more than allowed tells a body that is too long from one that just fits.
        match body.take(BODY_BYTES as u64 + 1).read_to_end(&mut bytes) {
            Ok(length) if length > BODY_BYTES => return refuse(413, "That is too long for a guestbook."),
            // A connection that broke looks like the end of the body.
            Ok(length) if announced.is_none_or(|announced| length == announced) => {}
            _ => return refuse(400, "The form did not arrive whole."),
        }
        let mut form = Self::default();
        for (name, value) in form_urlencoded::parse(&bytes) {
            match &*name {
                "author" => form.author = cleaned(&value),
                "message" => form.message = cleaned(&value),
                _ => {}
            }
        }
        Ok(form)
    }

    /// The entry, if it may be in the book.
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

/// Without control characters: PostgreSQL stores no NUL, and browsers end a line with CR LF.
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
