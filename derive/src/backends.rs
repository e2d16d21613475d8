//! One implementation for each kind of connection.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Ident, Path};

/// For which connections there are implementations.
pub(crate) struct Backends {
    /// Those of Diesel's backends that `check_for_backend` names; all where it does not.
    pub(crate) named: Option<Vec<Ident>>,
    /// Enums of connections.
    pub(crate) connections: Vec<Path>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Postgres,
    Mysql,
    Sqlite,
    /// Whatever an enum of connections is connected to.
    Any,
}

impl Backends {
    /// `make` for each connection, inside of what drops it where the library is built without that backend.
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
