use std::sync::Mutex;

use diesel::prelude::*;
use diesel::sql_types::BigInt;

/// One superuser connection, kept open so that it still works when the ordinary slots are taken.
pub struct Observer<C> {
    url: String,
    connection: Mutex<Option<C>>,
}

#[derive(QueryableByName)]
pub struct Number {
    #[diesel(sql_type = BigInt)]
    pub number: i64,
}

impl<C: Connection> Observer<C> {
    pub fn new(url: String) -> Observer<C> {
        Observer { url, connection: Mutex::new(None) }
    }

    /// A second connection of the same superuser.
    pub fn connect(&self) -> ConnectionResult<C> {
        C::establish(&self.url)
    }

    /// Whether the server takes the observer in.
    pub fn arrive(&self) -> bool {
        let mut connection = self.lock();
        *connection = self.connect().ok();
        connection.is_some()
    }

    pub fn leave(&self) {
        *self.lock() = None;
    }

    pub fn try_ask<T>(&self, question: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T, String> {
        let mut slot = self.lock();
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => self.connect().map_err(|error| format!("the observer cannot connect: {error}"))?,
        };
        let answer = question(&mut connection).map_err(|error| format!("the observer's query failed: {error}"))?;
        *slot = Some(connection);
        Ok(answer)
    }

    #[track_caller]
    pub fn ask<T>(&self, question: impl FnOnce(&mut C) -> QueryResult<T>) -> T {
        self.try_ask(question).unwrap_or_else(|error| panic!("{error}"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<C>> {
        self.connection.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
