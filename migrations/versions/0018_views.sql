-- The views that name sessions. One statement ends at each ";" that ends a line.

create or replace view "{schema}".live_sessions as
select {session_id} as session_id,
       n.name as node_name,
       s.owner as node_id,
       s.epoch,
       s.transport,
       s.protocol_version,
       s.client_name,
       s.client_version,
       -- subject@issuer via client, with the parts that are known; NULL for an anonymous session
       nullif(concat_ws(' via ',
                        nullif(concat_ws('@', s.principal_subject, s.principal_issuer), ''),
                        nullif(s.principal_client, '')), '') as principal,
       s.created_at,
       s.last_active_at,
       (select count(*) from "{schema}".requests r
         where r.session = s.id and r.rpc_id is not null and r.finished_at is null) as in_flight,
       (select count(*) from "{schema}".streams t where t.session = s.id and not t.closed and t.sink is not null) as open_streams
  from "{schema}".sessions s
  left join "{schema}".nodes n on n.node_id = s.owner
 where s.state = 'live';

create or replace view "{schema}".live_requests as
select {session_id} as session_id,
       r.rpc_id as request_id,
       r.method,
       r.name,
       n.name as node_name,
       case when r.claimed_epoch is null then 'waiting' else 'running' end as state,
       r.accepted_at as received_at,
       clock_timestamp() - r.accepted_at as age
  from "{schema}".requests r
  join "{schema}".sessions s on s.id = r.session
  left join "{schema}".nodes n on n.node_id = s.owner
 where r.rpc_id is not null and r.finished_at is null;

create or replace view "{schema}".live_streams as
select {session_id} as session_id,
       t.kind,
       -- a batch has one stream: its first request stands for it
       (select r.rpc_id from "{schema}".requests r
         where r.stream = t.id and r.rpc_id is not null order by r.position limit 1) as request_id,
       n.name as sink_node,
       t.next_seq,
       (select count(*) from "{schema}".events e where e.stream = t.id and e.seq > t.delivered_seq) as lag
  from "{schema}".streams t
  join "{schema}".sessions s on s.id = t.session
  left join "{schema}".nodes n on n.node_id = t.sink
 where not t.closed;

create or replace view "{schema}".takeover_history as
select coalesce({session_id}, h.session_id) as session_id,
       -- rows of dead nodes are removed after a while: then the node's id stands for its name
       coalesce(a.name, h.from_node::text) as from_node,
       coalesce(b.name, h.to_node::text) as to_node,
       h.epoch,
       h.reason,
       h.at
  from "{schema}".takeovers h
  left join "{schema}".sessions s on s.id = h.session and s.session_id = h.session_id
  left join "{schema}".nodes a on a.node_id = h.from_node
  left join "{schema}".nodes b on b.node_id = h.to_node;
