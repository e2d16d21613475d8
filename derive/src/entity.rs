//! `#[derive(Entity)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Result};

use crate::backends::{Backend, support_path};
use crate::model::Model;
use crate::{new_entity, update};

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let model = Model::read(input)?;
    let entity = entity(&model);
    let persist = model.backends.each(|backend, connection| persist(&model, backend, connection));
    let new = new_entity::generated(&model);
    Ok(quote!(#entity #persist #new))
}

fn entity(model: &Model) -> TokenStream {
    let support = support_path();
    let name = &model.name;
    let text = name.to_string();
    let (id_type, id) = {
        let types: Vec<_> = model.keys().map(|key| &key.ty).collect();
        let names: Vec<_> = model.keys().map(|key| &key.name).collect();
        match (&types[..], &names[..]) {
            ([ty], [name]) => (quote!(#ty), quote!(::core::clone::Clone::clone(&self.#name))),
            _ => (quote!((#(#types,)*)), quote!((#(::core::clone::Clone::clone(&self.#names),)*))),
        }
    };
    let versioned = model.version().is_some();
    let bump = model.version().map(|version| {
        let field = &version.name;
        quote!(self.#field += 1;)
    });
    let differences = model.updatable().map(|(index, field)| {
        let name = &field.name;
        let differs = quote_spanned!(field.ty.span()=> old.#name != new.#name);
        quote!(if #differs { columns |= 1u128 << #index; })
    });
    // The version is swapped like a column.
    let swapped =
        model.fields.iter().enumerate().filter(|(index, _)| !model.key.contains(index)).map(|(index, field)| {
            let name = &field.name;
            quote!(if columns & (1u128 << #index) != 0 { ::core::mem::swap(&mut self.#name, &mut other.#name); })
        });
    let same_version = model.version().map_or(quote!(true), |version| {
        let field = &version.name;
        quote!(self.#field == other.#field)
    });
    let parent_imports = quote! {
        #[allow(unused_imports)]
        use #support::{EntityParent as _, OtherParent as _};
    };
    let foreign_keys: Vec<_> = model.foreign_keys().collect();
    let parents: Vec<_> = foreign_keys.iter().map(|(parent, _)| *parent).collect();
    let is_updatable = |index: &usize| !model.key.contains(index) && !model.fields[*index].version;
    let keys = foreign_keys.iter().map(|(parent, fields)| {
        let columns =
            fields.iter().filter(|index| is_updatable(index)).fold(0u128, |columns, index| columns | 1 << index);
        let part = |&index: &usize| {
            let (name, optional) = (&model.fields[index].name, model.fields[index].is_optional());
            let question_mark = optional.then(|| quote!(?));
            quote!(::core::clone::Clone::clone(&self.#name)#question_mark)
        };
        let parts: Vec<_> = fields.iter().map(part).collect();
        let key = match &parts[..] {
            [one] => quote!(#one),
            several => quote!((#(#several,)*)),
        };
        quote! {{
            let parent = (&&#support::Parent::<#parent>(::core::marker::PhantomData)).table();
            // None if one of the columns is NULL.
            let reference = (|| ::core::option::Option::Some(#support::Reference::new(parent, #key)))();
            #support::ForeignKey { columns: #columns, parent, reference }
        }}
    });
    let nullable = foreign_keys.iter().flat_map(|(_, fields)| fields).filter(|index| is_updatable(index));
    let nullable = nullable.filter(|index| model.fields[**index].is_optional()).map(|index| {
        let name = &model.fields[*index].name;
        quote!(if columns & (1u128 << #index) != 0 { self.#name = ::core::option::Option::None; })
    });
    let table = &model.table;
    let counted = match model.auto_increment_key() {
        Some(field) => {
            let column = &field.column;
            quote!(#support::is_integer(#table::#column))
        }
        None => quote!(false),
    };
    let one_column = (model.key.len() == 1).then(|| quote!(impl #support::OneColumnKey for #name {}));
    let indices = model.updatable().map(|(index, _)| index);
    let written = model.updatable().map(|(_, field)| &field.name);
    let row_by_row = model.row_by_row;
    quote! {
        impl ::diesel_session::Entity for #name {
            type Id = #id_type;
            const NAME: &'static str = #text;
            const VERSIONED: bool = #versioned;
            const ROW_BY_ROW: bool = #row_by_row;

            fn id(&self) -> Self::Id {
                #id
            }

            fn is_auto_increment() -> bool {
                #counted
            }

            fn table() -> ::core::any::TypeId {
                ::core::any::TypeId::of::<#table::table>()
            }

            fn parents(found: &mut #support::Relations) {
                #parent_imports
                let _ = &found;
                #(
                    found.add(<Self as ::diesel_session::Entity>::table(), (&&#support::Parent::<#parents>(::core::marker::PhantomData)).table());
                    (&&#support::Parent::<#parents>(::core::marker::PhantomData)).visit(found);
                )*
            }

            #[allow(clippy::float_cmp)]
            fn differences(old: &Self, new: &Self) -> u128 {
                let mut columns = 0u128;
                let _ = (old, new);
                #(#differences)*
                columns |= 0;
                columns
            }

            fn has_version_of(&self, other: &Self) -> bool {
                let _ = other;
                #same_version
            }

            fn swap_columns(&mut self, other: &mut Self, columns: u128) {
                let _ = (&mut *other, columns);
                #(#swapped)*
            }

            fn bytes(&self, columns: u128) -> usize {
                #[allow(unused_imports)]
                use #support::{BytesField as _, SizedField as _, OptionalBytesField as _};
                let mut bytes = 0usize;
                let _ = columns;
                #(if (columns & (1u128 << #indices)) != 0 {
                    bytes += (&&&#support::Field(&self.#written)).bytes();
                })*
                bytes += 0;
                bytes
            }

            fn bump_version(&mut self) {
                #bump
            }

            fn foreign_keys(&self) -> ::std::vec::Vec<#support::ForeignKey> {
                #parent_imports
                ::std::vec![#(#keys),*]
            }

            fn set_null(&mut self, columns: u128) {
                let _ = columns;
                #(#nullable)*
            }
        }

        #one_column
    }
}

fn persist(model: &Model, backend: Backend, connection: &TokenStream) -> TokenStream {
    let support = support_path();
    let name = &model.name;
    let table = &model.table;
    let db = quote!(<#connection as ::diesel::Connection>::Backend);
    let traits = quote! {
        #[allow(unused_imports)]
        use ::diesel::{BoolExpressionMethods as _, ExpressionMethods as _, QueryDsl as _, RunQueryDsl as _};
    };
    let selection = quote!(<Self as ::diesel::SelectableHelper<#db>>::as_select());
    let columns: Vec<_> = model.keys().map(|key| &key.column).collect();
    let names: Vec<_> = model.keys().map(|key| &key.name).collect();
    let single = columns.len() == 1;
    let parts: Vec<_> = match single {
        true => vec![quote!(id)],
        false => (0..columns.len())
            .map(|index| {
                let index = syn::Index::from(index);
                quote!(&id.#index)
            })
            .collect(),
    };
    // `column = value`. A text has a condition of its own because of CHAR(n).
    let schema = if backend == Backend::Postgres { "pg_catalog." } else { "" };
    let is = |field: &crate::model::Field, value: TokenStream| {
        let column = &field.column;
        match field.is_text() {
            true => {
                quote!(#support::text_key::<#db, _>(#table::#column, #value, #schema))
            }
            false => quote!(#table::#column.eq(#value)),
        }
    };
    let are = |value: &dyn Fn(usize) -> TokenStream| -> Vec<TokenStream> {
        model.keys().enumerate().map(|(index, field)| is(field, value(index))).collect()
    };
    let by_id = are(&|index| parts[index].clone());
    let by_row = |row: &TokenStream| -> Vec<TokenStream> {
        are(&|index| {
            let name = names[index];
            quote!(&#row.#name)
        })
    };
    let texts: Vec<_> = model.keys().enumerate().filter(|(_, field)| field.is_text()).collect();
    let has_blanks = |value: &dyn Fn(usize) -> TokenStream| {
        let ends = texts.iter().map(|(index, _)| value(*index));
        quote!(false #(|| #support::ends_in_blanks(#ends))*)
    };
    let is_postgres = matches!(backend, Backend::Postgres | Backend::Any) && !texts.is_empty();
    let (finds, find_many) = match single {
        true => {
            let column = columns[0];
            let one_by_one = is_postgres.then(|| {
                let blanks = has_blanks(&|_| quote!(id));
                quote! {
                    if ids.iter().any(|id| #blanks) {
                        let mut found = ::std::vec::Vec::new();
                        for id in ids {
                            found.extend(<Self as ::diesel_session::unit_of_work::Persist<#connection>>::find(conn, id)?);
                        }
                        return ::core::result::Result::Ok(found);
                    }
                }
            });
            (
                1000_usize,
                quote! {
                    #one_by_one
                    #table::table.filter(#table::#column.eq_any(ids)).select(#selection).load(conn)
                },
            )
        }
        false => {
            let (first, rest) = (&by_id[0], &by_id[1..]);
            (
                100_usize,
                quote! {
                    let one_of = #support::any_of::<#db, _>(ids.iter().map(|id| #first #(.and(#rest))*));
                    #table::table.filter(one_of).select(#selection).load(conn)
                },
            )
        }
    };
    let of_version = |row: TokenStream| {
        model.version().map(|version| {
            let (column, field) = (&version.column, &version.name);
            quote!(.filter(#table::#column.eq(&#row.#field)))
        })
    };
    let update = {
        let indices = model.updatable().map(|(index, _)| index);
        let set_columns: Vec<_> = model.updatable().map(|(_, field)| &field.column).collect();
        let set_names = model.updatable().map(|(_, field)| &field.name);
        let version = model.version().map(|version| {
            let (column, field) = (&version.column, &version.name);
            quote!(#table::#column.eq(old.#field + 1),)
        });
        let by_version = of_version(quote!(old));
        let by_key = by_row(&quote!(old));
        match set_columns.is_empty() {
            true => quote!({
                let _ = (conn, old, new);
                ::core::result::Result::Ok(1)
            }),
            false => quote! {{
                let columns = <Self as ::diesel_session::Entity>::differences(old, new);
                ::diesel::update(#table::table #(.filter(#by_key))* #by_version)
                    .set((
                        #((columns & (1u128 << #indices) != 0).then(|| #table::#set_columns.eq(&new.#set_names)),)*
                        #version
                    ))
                    .execute(conn)
            }},
        }
    };
    let in_batches = single && model.version().is_none();
    let (deletes, delete) = match in_batches {
        true => {
            let (column, field) = (columns[0], names[0]);
            let one_by_one = is_postgres.then(|| {
                let blanks = has_blanks(&|_| quote!(&row.#field));
                let by_key = by_row(&quote!(row));
                quote! {
                    if rows.iter().any(|row| #blanks) {
                        let mut deleted = 0;
                        for row in rows {
                            deleted += ::diesel::delete(#table::table #(.filter(#by_key))*).execute(conn)?;
                        }
                        return ::core::result::Result::Ok(deleted);
                    }
                }
            });
            (
                1000_usize,
                quote! {
                    #one_by_one
                    ::diesel::delete(#table::table.filter(#table::#column.eq_any(rows.iter().map(|row| &row.#field)))).execute(conn)
                },
            )
        }
        false => {
            let by_version = of_version(quote!(row));
            let by_key = by_row(&quote!(row));
            (
                1_usize,
                quote! {
                    let mut deleted = 0;
                    for row in rows {
                        deleted += ::diesel::delete(#table::table #(.filter(#by_key))* #by_version).execute(conn)?;
                    }
                    ::core::result::Result::Ok(deleted)
                },
            )
        }
    };
    let update_many = update::many(model, backend, connection);
    // On the other backends, a SELECT returns the newest row, or the database refuses the write of an outdated one.
    let find_newest = match backend {
        Backend::Mysql => Some(quote!(#table::table #(.filter(#by_id))* .select(#selection).for_update().load(conn))),
        Backend::Any => Some(
            quote!(#support::for_update::<#db, _>(#table::table #(.filter(#by_id))* .select(#selection)).load(conn)),
        ),
        Backend::Postgres | Backend::Sqlite => None,
    };
    let find_newest = find_newest.map(|query| {
        quote! {
            fn find_newest(conn: &mut #connection, id: &Self::Id) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                #traits
                #query
            }
        }
    });
    let read_back = matches!(backend, Backend::Mysql | Backend::Any).then(|| {
        let counted = model.auto_increment_key().map(|field| {
            let column = &field.column;
            quote! {
                fn find_auto_increment(conn: &mut #connection, numbers: &[u64]) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                    #traits
                    #table::table
                        .filter(#support::auto_increment_keys::<#db, _>(#table::#column, numbers))
                        .order(#table::#column)
                        .select(#selection)
                        .load(conn)
                }
            }
        });
        quote! {
            #counted

            fn reset_last_insert_id(conn: &mut #connection) -> ::diesel::QueryResult<()> {
                #support::reset_last_insert_id(conn)
            }

            fn max_statement_bytes(conn: &mut #connection) -> ::diesel::QueryResult<::core::option::Option<usize>> {
                #support::max_statement_bytes(conn)
            }

            fn find_rounded(
                conn: &mut #connection,
                id: &Self::Id,
                digits: u8,
            ) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                #traits
                if !(false #(|| #support::has_time_of_day(#table::#columns))*) {
                    return ::core::result::Result::Ok(::std::vec::Vec::new());
                }
                #table::table
                    #(.filter(#support::rounded_key::<#db, _, _>(#table::#columns, #parts, digits)))*
                    .select(#selection)
                    .load(conn)
            }
        }
    });
    let goes_alone = is_postgres.then(|| {
        let blanks = has_blanks(&|index| {
            let name = names[index];
            quote!(&self.#name)
        });
        quote! {
            fn goes_alone(&self) -> bool {
                #blanks
            }
        }
    });
    quote! {
        impl ::diesel_session::unit_of_work::Persist<#connection> for #name {
            const MAX_FIND_KEYS: usize = #finds;
            const MAX_DELETE_ROWS: usize = #deletes;

            fn find(conn: &mut #connection, id: &Self::Id) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                #traits
                #table::table #(.filter(#by_id))* .select(#selection).load(conn)
            }

            #find_newest
            #read_back
            #goes_alone

            fn find_many(conn: &mut #connection, ids: &[Self::Id]) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                #traits
                #find_many
            }

            fn update(conn: &mut #connection, old: &Self, new: &Self) -> ::diesel::QueryResult<usize> {
                #traits
                #update
            }

            #update_many

            fn delete(conn: &mut #connection, rows: &[&Self]) -> ::diesel::QueryResult<usize> {
                #traits
                #delete
            }
        }
    }
}
