//! One page of the guestbook.

use diesel::prelude::*;
use diesel_session::Result;

use crate::database::DB;
use crate::entry::{Entry, entries};
use crate::request::Request;

const ENTRIES: i64 = 10;

pub(crate) struct Page {
    /// The entries, newest first.
    pub(crate) entries: Vec<Entry>,
    /// The number of the page, from 1 to `pages`.
    pub(crate) number: i64,
    /// The number of pages, at least 1: an empty guestbook has an empty page.
    pub(crate) pages: i64,
    /// The number of entries of the whole guestbook.
    pub(crate) total: i64,
}

impl Page {
    /// Loads the page with this number, or the nearest page that exists.
    pub(crate) fn load(wanted: i64) -> Result<Self> {
        let session = DB.session()?;
        // The read-only scope of a GET request gives both statements the same state of the data.
        let total = session.count(entries::table)?;
        let pages = ((total + ENTRIES - 1) / ENTRIES).max(1);
        let number = wanted.clamp(1, pages);
        let entries = session.load(
            entries::table
                .select(Entry::as_select())
                // `written_at` is no order: two entries may have the same second.
                .order(entries::id.desc())
                .limit(ENTRIES)
                .offset((number - 1) * ENTRIES),
        )?;
        Ok(Self { entries, number, pages, total })
    }

    /// The number in `?page=N`, or 1 if it is missing or invalid.
    pub(crate) fn wanted(request: &Request) -> i64 {
        let mut parameters = form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
        parameters.find(|(name, _)| name == "page").and_then(|(_, number)| number.parse().ok()).unwrap_or(1)
    }

    /// The link to the page with this number.
    pub(crate) fn link(number: i64) -> String {
        if number <= 1 { "/".into() } else { format!("/?page={number}") }
    }
}
