//! The UPDATE of several rows and the locks, on databases that have such statements.

use proc_macro2::TokenStream;
use quote::quote;

use crate::backends::{Backend, support_path};
use crate::model::Model;

/// Maximum number of parameters in PostgreSQL's protocol.
const MAX_BINDS: usize = 65_535;

/// Maximum number of rows of one UPDATE. A statement of more than a few hundred rows is not faster.
const MAX_UPDATE_ROWS: usize = 500;

/// The items of `Persist` for several rows. Only PostgreSQL can return which rows an UPDATE has found: SQLite's
/// `RETURNING` cannot return columns of the list, and MariaDB has no `RETURNING` for an UPDATE.
pub(crate) fn many(model: &Model, backend: Backend, connection: &TokenStream) -> TokenStream {
    if backend != Backend::Postgres || model.row_by_row {
        return TokenStream::new();
    }
    let support = support_path();
    let table = &model.table;
    let updates = MAX_UPDATE_ROWS.min(MAX_BINDS / model.fields.len().max(1));
    let keys: Vec<_> = model.keys().map(|key| (&key.column, &key.name)).collect();
    let key_columns = |row: &TokenStream| {
        let columns = keys
            .iter()
            .map(|(column, field)| quote!(#support::list_column(#table::#column, rows.iter().map(|#row| &row.#field))));
        quote!(::std::vec![#(#columns),*])
    };
    let (updated_keys, locked_keys) = (key_columns(&quote!((row, _))), key_columns(&quote!(row)));
    let version = match model.version() {
        Some(version) => {
            let (column, field) = (&version.column, &version.name);
            quote!(::core::option::Option::Some(#support::list_column(#table::#column, rows.iter().map(|(old, _)| &old.#field))))
        }
        None => quote!(::core::option::Option::None),
    };
    let sets = model.updatable().map(|(index, written)| {
        let (column, field) = (&written.column, &written.name);
        quote! {
            if (columns & (1u128 << #index)) != 0 {
                sets.push(#support::list_column(#table::#column, rows.iter().map(|(_, new)| &new.#field)));
            }
        }
    });
    let update_many = model.updatable().next().is_some().then(|| quote! {
        const MAX_UPDATE_ROWS: usize = #updates;

        fn update_many(
            conn: &mut #connection,
            rows: &[(&Self, &Self)],
            columns: u128,
        ) -> ::diesel::QueryResult<::std::vec::Vec<usize>> {
            let mut sets = ::std::vec::Vec::new();
            #(#sets)*
            let update = #support::update_rows(#table::table, rows.len(), #updated_keys, #version, sets);
            let found: ::std::vec::Vec<i32> = ::diesel::RunQueryDsl::load(update, conn)?;
            ::core::result::Result::Ok(found.into_iter().filter_map(|row| ::core::primitive::usize::try_from(row).ok()).collect())
        }
    });
    let locks = MAX_BINDS / keys.len().max(1);
    quote! {
        #update_many

        const MAX_LOCK_ROWS: usize = #locks;

        fn may_lock(conn: &mut #connection) -> ::diesel::QueryResult<bool> {
            let mut may: ::std::vec::Vec<bool> = ::diesel::RunQueryDsl::load(#support::may_lock(#table::table), conn)?;
            ::core::result::Result::Ok(may.pop().unwrap_or(true))
        }

        fn lock(conn: &mut #connection, rows: &[&Self], for_delete: bool) -> ::diesel::QueryResult<()> {
            let lock = #support::lock_rows(#table::table, rows.len(), #locked_keys, for_delete);
            ::diesel::RunQueryDsl::execute(lock, conn).map(::core::mem::drop)
        }
    }
}
