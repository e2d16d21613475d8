//! One page of the book.

use diesel::prelude::*;
use diesel_session::Result;

use crate::database::DB;
use crate::entry::{Entry, entries};
use crate::request::Request;

const ENTRIES: i64 = 10;

pub(crate) struct Page {
    /// Newest first.
    pub(crate) entries: Vec<Entry>,
    /// From 1 to `pages`.
    pub(crate) number: i64,
    /// At least 1: an empty book has an empty page.
    pub(crate) pages: i64,
    /// How many entries the whole book has.
    pub(crate) total: i64,
}

impl Page {
    /// The page with that number, or the nearest there is.
    pub(crate) fn load(wanted: i64) -> Result<Self> {
        let session = DB.session()?;
        // One transaction for both statements: on SQLite they see the book at the same moment.
        let total = session.count(entries::table)?;
        let pages = ((total + ENTRIES - 1) / ENTRIES).max(1);
        let number = wanted.clamp(1, pages);
        let entries = session.load(
            entries::table
                .select(Entry::as_select())
                // Not by `written_at`: two entries of the same second would have no order.
                .order(entries::id.desc())
                .limit(ENTRIES)
                .offset((number - 1) * ENTRIES),
        )?;
        Ok(Self { entries, number, pages, total })
    }

    /// The number in `?page=N`; 1 where there is none, or nonsense.
    pub(crate) fn wanted(request: &Request) -> i64 {
        let mut parameters = form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
        parameters.find(|(name, _)| name == "page").and_then(|(_, number)| number.parse().ok()).unwrap_or(1)
    }

    /// Where the page of that number is.
    pub(crate) fn link(number: i64) -> String {
        if number <= 1 { "/".into() } else { format!("/?page={number}") }
    }
}
