//! One implementation for each type of connection.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Ident, Path};

/// The connections for which the traits are implemented.
pub(crate) struct Backends {
    /// The backends that `check_for_backend` names. None: all of Diesel's backends.
    pub(crate) named: Option<Vec<Ident>>,
    /// Enums of connections.
    pub(crate) connections: Vec<Path>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Postgres,
    Mysql,
    Sqlite,
    /// The backend of an enum of connections, known at run time only.
    Any,
}

impl Backends {
    /// Calls `make` for each connection. A gate macro drops the result if the library is built without that backend.
    pub(crate) fn each(&self, make: impl Fn(Backend, &TokenStream) -> TokenStream) -> TokenStream {
        let mut all = TokenStream::new();
        for (name, backend, connection, gate) in [
            ("Pg", Backend::Postgres, quote!(::diesel::PgConnection), quote!(::diesel_session::__if_postgres)),
            ("Mysql", Backend::Mysql, quote!(::diesel::MysqlConnection), quote!(::diesel_session::__if_mysql)),
            ("Sqlite", Backend::Sqlite, quote!(::diesel::SqliteConnection), quote!(::diesel_session::__if_sqlite)),
        ] {
            if self.named.as_ref().is_none_or(|named| named.iter().any(|one| one == name)) {
                let made = make(backend, &connection);
                all.extend(quote!(#gate! { #made }));
            }
        }
        all.extend(self.connections.iter().map(|connection| make(Backend::Any, &quote!(#connection))));
        all
    }
}

/// The module of items that only derived code names.
pub(crate) fn support_path() -> TokenStream {
    quote!(::diesel_session::unit_of_work::derive_support)
}
