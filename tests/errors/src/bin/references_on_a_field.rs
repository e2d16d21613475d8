//~ error: a foreign key of one column is `references = Entity`; one of several columns stands on the struct
use diesel::prelude::*;
use diesel_session::Entity;
use errors::User;
use errors::schema::posts;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = posts)]
pub struct Post {
    pub id: i32,
    #[entity(references(User, columns = (id, author_id)))]
    pub author_id: i32,
}

fn main() {}
